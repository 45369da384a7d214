"""gemini-edge beside other runtimes, each in its own environment: `gemini-edge bench BUNDLE --peers FILE`.

README.md here says how to set the peers up; nothing in this package installs anything.
"""
