"""Errors in a command line: tyro's boxes on stderr as one line, like every other error of a user."""

import contextlib
import io
import re
import sys
from collections.abc import Iterator

from .errors import ConfigError

_KINDS = {"INT": "an integer", "FLOAT": "a number", "INT [INT ...]": "integers", "FLOAT [FLOAT ...]": "numbers"}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Run `tyro.cli` inside the block, and turn its boxed errors into a `ConfigError` of one line.

    Raises:
      ConfigError: the command line is wrong.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if stop.code:
            raise ConfigError(one_line(printed.getvalue())) from None
        raise
    sys.stderr.write(printed.getvalue())


def one_line(box: str) -> str:
    """Return the sentence that one of tyro's boxes stands for; a box of an unknown kind gives its first section."""
    sections = _sections(box)
    first = _joined(sections[0])
    if not first:  # another version of tyro: whatever it says
        return _joined(box.splitlines())
    usage = re.search(
        r"For full helptext, (?:run|see):? (.+? --help)", _joined([line for section in sections for line in section])
    )
    return _sentence(first, sections) + (f"; see {usage[1]}" if usage else "")


def _sentence(first: str, sections: list[list[str]]) -> str:
    if first.startswith("Missing from"):
        names = [line if line.startswith("{") else line.split(", ")[-1].split()[0] for line in _indented(sections[0])]
        return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    if match := re.fullmatch(r"Missing value for argument '(.+)'\. Expected (\S+) values\.", first):
        name, count = _long(match[1]), match[2]
        if not name.startswith("-"):
            return f"{name.upper()} is missing"
        return f"{name} needs {'a value' if count == '1' else f'{count} values' if count.isdigit() else 'values'}"
    if match := re.fullmatch(r"invalid choice '(.*)' for argument '(.+)'\. Expected one of \((.*)\)\.", first):
        name = _long(match[2])
        choices = re.findall(r"'([^']*)'", match[3])
        if "None" in choices:  # then tyro's order changes from run to run
            choices = sorted(set(choices) - {"None"})
        return f"{name if name.startswith('-') else name.upper()} must be one of {', '.join(choices)}, not {match[1]}"
    if match := re.match(r"Error parsing ([^ :]+): .*?(?:instantiated from \[(.*?)\]|: '([^']*)'$)", first):
        name = _long(match[1])
        value = match[3] if match[2] is None else match[2].replace("', '", " ").strip("'")
        usage = [line.strip() for section in sections[1:] for line in section if f"{name} " in f"{line} "]
        kind = usage[0].split(f"{name} ")[-1] if usage else ""
        return f"{name} takes {_KINDS.get(kind, kind)}, not {value}" if kind else f"{name} cannot be {value}"
    if match := re.match(r"Unrecognized options: (.+)", first):
        return _unknown(match[1].split(", "), sections)
    if match := re.fullmatch(r"Expected one of \{(.+)\}\.", first):
        return f"the subcommand is missing: one of {match[1]}"
    return first


def _unknown(words: list[str], sections: list[list[str]]) -> str:
    options = [word for word in words if word.startswith("-")]
    for section in sections[1:]:
        text = _joined(section)
        if text.startswith("Available subcommands: ") and not options:
            return f"unknown subcommand {words[0]}: it must be one of {text.partition(': ')[2]}"
    if not options:
        return f"too many arguments: {', '.join(words)}"
    lines = [line for section in sections[1:] for line in _indented(section)]
    similar = dict.fromkeys(name[0] for line in lines if (name := re.search(r"--[\w-]+", line)) and line[0] == "-")
    hint = f" (did you mean {' or '.join(similar)}?)" if similar else ""
    return f"unknown option{'s' if len(options) > 1 else ''} {', '.join(options)}{hint}"


def _long(names: str) -> str:
    """Return the long one of an option's names, such as `-b/--batch-size`."""
    return max(re.split(r"/|, ?", names), key=len)


def _indented(section: list[str]) -> list[str]:
    """Return the lines of a list's items, which tyro indents by four; their descriptions are indented by more."""
    return [line.strip() for line in section if re.match(r" {4}\S", line)]


def _joined(lines: list[str]) -> str:
    return " ".join(" ".join(lines).split())


def _sections(box: str) -> list[list[str]]:
    """Return the lines between a box's rules, without its title, frame and colours.

    Where stdout cannot print a frame, tyro prints the title on a line of its own, and spaces instead of a frame.
    """
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).strip("\n").splitlines()
    framed = bool(lines) and lines[0].startswith("╭")
    lines = [re.sub(r"^│ ?|\s*│$", "", line) for line in lines[1:-1]] if framed else [line[2:] for line in lines[2:]]
    sections: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[─-]+", line.strip()):
            sections.append([])
        else:
            sections[-1].append(line.rstrip())
    return sections
