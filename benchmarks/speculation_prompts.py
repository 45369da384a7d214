"""What speculation is timed on: 20 prompts whose answer mostly repeats the prompt, 8 that are free text.

All are plain continuations, so that a base model and an instructed one can both be measured.
"""

_LETTER = (
    "Dear Ms Albrecht,\n\n"
    "thank you for visiting our workshop last Thursday. We have checked the two oak cabinets that you "
    "left with us. The left door of the larger cabinet is warped and its lower hinge is missing; the "
    "smaller one only needs new varnish. The repair will take about three weeks and cost 340 euros, "
    "including the hinge. Please let us know by the end of the month whether we should begin.\n\n"
    "Kind regards,\n"
    "Tomas Lindqvist"
)
_FERRY = (
    "The ferry to Norrland island leaves the harbour at 7:40 every morning and returns at 18:15 in the "
    "evening. Tickets cost 12 euros for adults and 5 euros for children under 14. Bicycles travel free "
    "of charge, but dogs must stay on the lower deck. In winter, when the strait freezes, a bus "
    "replaces the ferry and leaves from the market square ten minutes earlier."
)
_BEES = (
    "Honey bees tell each other where to find flowers by dancing on the comb. A bee that returns from "
    "a rich meadow runs in a straight line while shaking her body, then turns back and repeats the "
    "run. The angle of the line shows the direction relative to the sun, and the length of the run "
    "shows the distance. Karl von Frisch described this dance in 1927 and received the Nobel Prize for "
    "it in 1973."
)
_STAFF = (
    "Name: Ingrid Solheim; Role: structural engineer; Office: Bergen; Phone: 555-0142\n"
    "Name: Rafael Monteiro; Role: site manager; Office: Porto; Phone: 555-0178\n"
    "Name: Chiyo Tanaka; Role: surveyor; Office: Nagoya; Phone: 555-0113\n"
    "Name: Declan Murphy; Role: architect; Office: Cork; Phone: 555-0199\n"
)
_MINUTES = (
    "Minutes of the garden club, 4 May. Present: Ruth, Samir, Olga and Pete. Ruth reported that the "
    "new greenhouse has been paid for and will be delivered on 22 May. Samir will borrow a van to "
    "bring forty bags of soil from the depot. Olga asked for two volunteers to repaint the fence; Pete "
    "and Ruth agreed. The next meeting is on 1 June at seven o'clock in the library."
)
_STATS = '''def mean(values):
    """Average of a list of numbers."""
    total = 0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    """Mean squared distance from the average."""
    center = mean(values)
    total = 0
    for value in values:
        total += (value - center) ** 2
    return total / len(values)
'''
_STACK = """class Stack:
    def __init__(self):
        self.items = []

    def push(self, item):
        self.items.append(item)

    def pop(self):
        if not self.items:
            raise IndexError("pop from an empty stack")
        return self.items.pop()

    def peek(self):
        if not self.items:
            raise IndexError("peek into an empty stack")
        return self.items[-1]
"""
_CONFIG = """{
  "server": {"host": "127.0.0.1", "port": 8080, "timeout_seconds": 30},
  "logging": {"level": "info", "file": "/var/log/orders.log", "rotate_daily": true},
  "database": {"name": "orders", "user": "reader", "pool_size": 5},
  "features": {"coupons": true, "gift_wrap": false, "express": true}
}
"""
_SQL = """SELECT customers.name, customers.city, orders.placed_at, orders.total
FROM customers
JOIN orders ON orders.customer_id = customers.id
WHERE orders.placed_at >= '2024-01-01'
  AND orders.total > 100
ORDER BY orders.placed_at DESC
LIMIT 50;
"""
_PARSE = '''def parse_line(line):
    """Split one line of the form key=value; empty lines and comments give None."""
    line = line.strip()
    if not line or line.startswith("#"):
        return None
    key, separator, value = line.partition("=")
    if not separator:
        raise ValueError("no equals sign in " + line)
    return key.strip(), value.strip()
'''


def _rewrite(task: str, text: str, start: str = "") -> str:
    return f"{task}\n\nText:\n{text}\n\nRewritten text:\n{start}"


def _extract(text: str, task: str, start: str = "") -> str:
    return f"{text}\n\n{task}\n{start}"


def _edit(code: str, task: str, start: str = "") -> str:
    return f"Original code:\n\n{code}\nThe same code, {task}:\n\n{start}"


COPY_PROMPTS = (
    _rewrite(
        "Rewrite the letter and change the price to 380 euros.",
        _LETTER,
        "Dear Ms Albrecht,\n\nthank you for visiting our workshop",
    ),
    _rewrite(
        "Rewrite the letter to Mr Brandt instead of Ms Albrecht.",
        _LETTER,
        "Dear Mr Brandt,\n\nthank you for visiting our workshop last Thursday. We have checked the two oak",
    ),
    _rewrite(
        "Repeat the text and correct the spelling mistake.",
        _FERRY.replace("evening", "evning"),
        "The ferry to Norrland island leaves the harbour at 7:40 every morning and returns",
    ),
    _rewrite(
        "Repeat the text with prices in dollars.",
        _FERRY,
        "The ferry to Norrland island leaves the harbour at 7:40 every morning and returns",
    ),
    _rewrite(
        "Copy the text and correct the year of the prize to 1974.",
        _BEES,
        "Honey bees tell each other where to find flowers by dancing on the comb. A bee that returns",
    ),
    _rewrite(
        "Copy the text without any change.",
        _BEES,
        "Honey bees tell each other where to find flowers by dancing on the comb.",
    ),
    _rewrite(
        "Write the minutes again and change the date of the next meeting to 8 June.",
        _MINUTES,
        "Minutes of the garden club, 4 May. Present: Ruth, Samir, Olga and Pete. Ruth reported that",
    ),
    _extract(
        _STAFF,
        "The same list once more, in the same order:",
        "Name: Ingrid Solheim; Role: structural engineer; Office: Bergen;",
    ),
    _extract(_STAFF, "The lines about Porto and Cork, copied word by word:", "Name: Rafael Monteiro;"),
    _extract(
        _FERRY,
        "The sentences of the text that mention a price or a time:",
        '"The ferry to Norrland island leaves the harbour at 7:40 every morning and',
    ),
    _extract(_MINUTES, "Who does what, in the words of the minutes:", "- Ruth reported that"),
    _extract(_BEES, "Quote the sentences that explain the dance:", '"A bee that returns'),
    _extract(_LETTER, "The damages and the price, quoted from the letter:", '"The left door'),
    _edit(
        _STATS,
        "with the name values changed to numbers",
        'def mean(numbers):\n    """Average of a list of numbers."""\n    total = 0\n'
        "    for value in numbers:",
    ),
    _edit(_STATS, "with type hints", "def mean(values: list[float]) -> float:"),
    _edit(_STACK, "with the class renamed to Pile", "class Pile:"),
    _edit(_STACK, "with a docstring in every method", "class Stack:"),
    _edit(_CONFIG, "with port 9090 instead of 8080", "{"),
    _edit(_SQL, "limited to 20 rows", "SELECT"),
    _edit(_PARSE, "with the function renamed to read_line", "def read_line(line):"),
)

FREE_PROMPTS = (
    "Once upon a time, in a village between two rivers, there lived a clockmaker who",
    "The main reasons why the price of bread rose in the nineteenth century were",
    "My grandmother's garden was the first place where I",
    "To understand how a refrigerator works, imagine",
    "The captain looked at the sky and knew at once that",
    "Three things surprised me when I moved to the north:",
    "In the year 2150, most people will travel by",
    "A good question to ask before you buy an old house is",
)
