"""The command line in Markdown, from the commands themselves."""

from __future__ import annotations

from typing import Any

from .results import markdown


def commands() -> str:
    """A section for every command: what it does, how it is called, its arguments and options."""
    import typer.main

    from mmflex.cli import app

    group: Any = typer.main.get_command(app)
    return "\n\n".join(_command(name, group.commands[name]) for name in sorted(group.commands)) + "\n"


def _command(name: str, command: Any) -> str:
    shown = [p for p in command.params if p.name != "help" and not getattr(p, "hidden", False)]
    arguments = [_names(p).strip("`") for p in shown if p.param_type_name == "argument"]
    options = ["[OPTIONS]"] if len(arguments) < len(shown) else []
    parts = [
        f"## mmflex {name}",
        f"```bash\n{' '.join(['mmflex', name, *options, *arguments])}\n```",
        _text(command.help or ""),
    ]
    if shown:
        rows = [(_names(p), " ".join(_text(p.help or "").split()), _default(p)) for p in shown]
        parts.append(markdown(("argument", "what it is", "default"), rows, right=False))
    return "\n\n".join(parts)


def _names(parameter: Any) -> str:
    """As people write it: ``FILE``, ``[FILE]``, `` `--output`, `-o` ``."""
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
        return f"`{name if parameter.required or name.startswith('[') else f'[{name}]'}`"
    return ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))


def _default(parameter: Any) -> str:
    if parameter.required:
        return "needed"
    value = parameter.default
    return "" if value is None or value is False or callable(value) or value in ("", (), []) else f"`{value}`"


def _text(text: str) -> str:
    """Help without rich's markup: paragraphs with their lines joined; indented ones are commands."""
    from rich.text import Text

    plain = Text.from_markup(text.replace("\b", "")).plain
    parts = []
    for paragraph in plain.strip("\n").split("\n\n"):
        lines = paragraph.strip("\n").splitlines()
        if lines and all(line.startswith("  ") for line in lines):
            parts.append("\n".join(["```bash", *(line.strip() for line in lines), "```"]))
        else:
            parts.append(" ".join(paragraph.split()))
    return "\n\n".join(parts)
