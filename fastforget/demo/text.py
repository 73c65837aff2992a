"""Real text that every machine with Python has: documentation, source code, tables and licences.

The base model is trained on the *upstream* domains and fine-tuned on the *task* domains. Nothing is downloaded, and
nothing but the standard library and this package's own dependencies is needed.
"""

from __future__ import annotations

import ast
import contextlib
import dis
import importlib
import importlib.metadata
import io
import json
import pydoc
import random
import re
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

# A domain with less text than this is left out, and the demo says so.
MIN_CHARACTERS = 20_000
# An upstream example ends at the first blank line after a drawn length in this range, or at this many characters.
EXAMPLE_CHARACTERS = (150, 450)
MAX_EXAMPLE_CHARACTERS = 600


@dataclass(frozen=True)
class Document:
    """One text and where it comes from.

    Attributes:
        source: a file's path below the standard library, a documentation topic, ...
        text: the text itself.
    """

    source: str
    text: str


@dataclass(frozen=True)
class Domain:
    """A kind of text, and how it is found.

    Attributes:
        name: short name, also a folder's name.
        about: what it is, for the report.
        find: returns the documents.
        kind: how the base is fine-tuned on it: "full" or "adapter"; "" for an upstream domain.
    """

    name: str
    about: str
    find: Callable[[], list[Document]]
    kind: str = ""


def library_files(*patterns: str) -> list[Document]:
    """Returns the standard library's files that match the patterns, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    documents = []
    for path in paths:
        source = path.relative_to(root)
        if not {"test", "tests", "idle_test", "site-packages"} & set(source.parts):
            documents.append(Document(source.as_posix(), path.read_text(encoding="utf-8", errors="replace")))
    return documents


def documentation_topics() -> list[Document]:
    """Returns the pages behind Python's `help()`."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return [Document(name, text.strip("\n")) for name, text in sorted(topics.items())]


def licences() -> list[Document]:
    """Returns the licences of the installed packages and of the operating system, each text once."""
    paths = list(Path("/usr/share/common-licenses").glob("*"))
    for package in ("torch", "numpy", "pyarrow", "matplotlib"):
        files = []
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            files = importlib.metadata.files(package) or []
        for file in files:
            if re.match(r"(LICEN[CS]E|NOTICE)", file.name) and file.suffix in ("", ".txt", ".md"):
                paths.append(Path(str(file.locate())))
    texts = {path.read_text(encoding="utf-8", errors="replace"): path.name for path in sorted(paths) if path.is_file()}
    return [Document(name, text) for text, name in texts.items()]


def unicode_records() -> list[Document]:
    """Returns the Unicode database's records of about 11,000 characters, as JSON lines."""
    documents = []
    for start in range(0xA0, 0x3000, 32):
        rows = [
            {
                "code": f"U+{code:04X}",
                "name": unicodedata.name(chr(code)),
                "category": unicodedata.category(chr(code)),
                "bidirectional": unicodedata.bidirectional(chr(code)),
                "decomposition": unicodedata.decomposition(chr(code)),
            }
            for code in range(start, start + 32)
            if unicodedata.name(chr(code), "")
        ]
        if rows:
            documents.append(Document(f"U+{start:04X}", "\n".join(json.dumps(row) for row in rows) + "\n"))
    return documents


def bytecode(*patterns: str) -> list[Document]:
    """Returns the disassembly of the standard library's matching files."""
    documents = []
    for document in library_files(*patterns):
        listing = io.StringIO()
        dis.dis(compile(document.text, document.source, "exec"), file=listing)
        documents.append(Document(document.source, without_addresses(listing.getvalue())))
    return documents


def syntax_trees(*patterns: str) -> list[Document]:
    """Returns the syntax trees of the standard library's matching files."""
    return [Document(d.source, ast.dump(ast.parse(d.text), indent=1) + "\n") for d in library_files(*patterns)]


def web_pages(*modules: str) -> list[Document]:
    """Returns pydoc's HTML pages about the modules."""
    pages = [(name, pydoc.html.docmodule(importlib.import_module(name))) for name in modules]
    return [Document(f"{name}.html", without_addresses(page)) for name, page in pages]


def without_addresses(text: str) -> str:
    """Returns the text without memory addresses and the library's own path, which differ from run to run."""
    return re.sub(r"(?: |&nbsp;)at(?: |&nbsp;)0x[0-9a-fA-F]+", "", text).replace(sysconfig.get_path("stdlib"), "")


UPSTREAM = (
    Domain("documentation", "the pages behind help()", documentation_topics),
    Domain(
        "numbers",
        "arithmetic, statistics, dates",
        partial(
            library_files,
            *("_pydecimal.py", "statistics.py", "fractions.py", "random.py", "datetime.py", "_pydatetime.py"),
            *("calendar.py", "_strptime.py", "numbers.py", "heapq.py", "bisect.py", "colorsys.py", "ipaddress.py"),
        ),
    ),
    Domain(
        "files",
        "paths, archives, input and output",
        partial(
            library_files,
            *("pathlib.py", "pathlib/*.py", "os.py", "shutil.py", "tarfile.py", "zipfile.py", "zipfile/*.py"),
            *("tempfile.py", "glob.py", "posixpath.py", "ntpath.py", "filecmp.py", "gzip.py", "lzma.py", "_pyio.py"),
        ),
    ),
    Domain(
        "text",
        "parsing and formatting",
        partial(
            library_files,
            *("difflib.py", "textwrap.py", "string.py", "re/*.py", "pprint.py", "configparser.py", "csv.py"),
            *("shlex.py", "argparse.py", "optparse.py", "gettext.py", "reprlib.py", "plistlib.py", "json/*.py"),
        ),
    ),
    Domain(
        "language",
        "inspection, types, pickling",
        partial(
            library_files,
            *("inspect.py", "ast.py", "typing.py", "dis.py", "tokenize.py", "dataclasses.py", "enum.py", "types.py"),
            *("functools.py", "traceback.py", "pickle.py", "copy.py", "contextlib.py", "warnings.py", "weakref.py"),
        ),
    ),
    Domain(
        "tools",
        "debuggers, profilers, threads, logging",
        partial(
            library_files,
            *("doctest.py", "pdb.py", "bdb.py", "cmd.py", "pydoc.py", "trace.py", "timeit.py", "profile.py"),
            *("pstats.py", "code.py", "subprocess.py", "threading.py", "sched.py", "queue.py", "logging/*.py"),
        ),
    ),
)

# Both kinds of fine-tuning cover both source code and text that is no source code.
TASKS = (
    Domain("email", "source code for mail", partial(library_files, "email/**/*.py", "mailbox.py"), "adapter"),
    Domain("licences", "legal prose", licences, "full"),
    Domain("asyncio", "source code for event loops", partial(library_files, "asyncio/*.py"), "adapter"),
    Domain(
        "web",
        "source code for HTTP, FTP and SMTP",
        partial(library_files, "http/*.py", "urllib/*.py", "xmlrpc/*.py", "ftplib.py", "smtplib.py", "imaplib.py"),
        "full",
    ),
    Domain("encodings", "tables of characters", partial(library_files, "encodings/*.py"), "adapter"),
    Domain("unicode", "the Unicode database as JSON", unicode_records, "full"),
    Domain("bytecode", "disassembled functions", partial(bytecode, "selectors.py", "socketserver.py"), "adapter"),
    Domain("unittest", "source code of the test runner", partial(library_files, "unittest/*.py"), "full"),
    Domain("xml", "source code for XML", partial(library_files, "xml/**/*.py"), "adapter"),
    Domain("html", "web pages", partial(web_pages, "email.message", "http.client", "asyncio.events"), "full"),
    Domain("trees", "abstract syntax trees", partial(syntax_trees, "sqlite3/*.py", "zoneinfo/*.py"), "adapter"),
    Domain(
        "processes",
        "source code for processes and pools",
        partial(library_files, "multiprocessing/*.py", "concurrent/**/*.py"),
        "full",
    ),
)


def sample(documents: Iterable[Document], characters: int, seed: int) -> list[Document]:
    """Returns documents in a random order, at most `characters` long in all; the last one is cut at a line's end."""
    documents = sorted(documents, key=lambda document: document.source)
    random.Random(seed).shuffle(documents)
    chosen = []
    for document in documents:
        text = document.text[:characters]
        text = text if text == document.text else text[: text.rfind("\n") + 1]
        if text.strip():
            chosen.append(Document(document.source, text))
        characters -= len(document.text)
        if characters <= 0:
            break
    return chosen


def split_examples(documents: Iterable[Document], seed: int) -> list[tuple[str, str]]:
    """Cuts documents into examples at blank lines.

    Args:
        documents: the documents of one domain.
        seed: of the drawn lengths.

    Returns:
        Pairs of a place, "source:line", and the text from there on.
    """
    draw = random.Random(seed)
    examples = []
    for document in documents:
        lines = io.StringIO(document.text).readlines()  # str.splitlines would count form feeds, editors do not
        start, text, wanted = 1, "", draw.uniform(*EXAMPLE_CHARACTERS)
        for number, line in enumerate([*lines, "\n"], 1):
            full = len(text) + len(line) > MAX_EXAMPLE_CHARACTERS
            blank = not line.strip()
            if full or (blank and len(text) >= wanted) or number > len(lines):
                if len(text.strip()) >= EXAMPLE_CHARACTERS[0]:
                    examples.append((f"{document.source}:{start}", text.rstrip()))
                start, text, wanted = number, "", draw.uniform(*EXAMPLE_CHARACTERS)
            if text or not blank:
                start = start if text else number
                text += line[:MAX_EXAMPLE_CHARACTERS]
    return examples
