"""See the README of the repository for what this folder holds."""
