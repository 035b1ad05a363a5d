"""edgellm tokenize"""

from __future__ import annotations

import json
from pathlib import Path

import click

from edgellm.options import model_option


@click.command()
@click.argument("text", required=False)
@click.option("--file", type=click.Path(path_type=Path), help="Read the text from a UTF-8 file.")
@model_option
@click.option("--ids", "only_ids", is_flag=True, help="Print only the ids, as a JSON list.")
@click.option("--no-special", is_flag=True, help="Do not add BOS or EOS.")
@click.option("--no-parse-special", is_flag=True, help="Treat special tokens in the text as plain text.")
def command(
    text: str | None, file: Path | None, model: str, only_ids: bool, no_special: bool, no_parse_special: bool
) -> None:
    """Print the tokens of TEXT, one per line: id and piece."""
    from edgellm import store
    from edgellm.loading import open_model, open_tokenizer

    if (text is None) == (file is None):
        raise click.UsageError("Give either TEXT or --file.")
    opened = open_model(store.resolve(model))
    tokenizer = open_tokenizer(opened)
    opened.file.close()
    ids = tokenizer.encode(
        read_text(file) if file else text or "", add_special=not no_special, parse_special=not no_parse_special
    )
    if only_ids:
        click.echo(json.dumps(ids))
    else:
        for id in ids:
            click.echo(f"{id:>7}  {tokenizer.id_to_token(id)!r}")


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, line endings unchanged; raises UsageError if it is not UTF-8 or cannot be read."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise click.UsageError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}."
        ) from None
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read: {error.strerror}.") from None
