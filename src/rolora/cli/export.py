"""``rolora export``: a finished run's adapter in other forms, or on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from rolora.cli.options import Json
from rolora.cli.printing import err_console, note, show, working
from rolora.errors import ConfigError, printable


def export(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|ADAPTER", help="a run folder or an adapter folder")
    ],
    merged: Annotated[
        Path | None,
        typer.Option(
            help="a new folder for the base with the adapter in its weights; of a GGUF base it "
            "can be a new .gguf file"
        ),
    ] = None,
    gguf: Annotated[
        Path | None, typer.Option(help="a new file for the adapter alone, for llama.cpp's --lora")
    ] = None,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="USER/REPOSITORY",
            help="upload the adapter folder to the Hugging Face Hub, after a question; a new "
            "repository is private",
        ),
    ] = None,
    dtype: Annotated[
        Literal["fp32", "fp16", "bf16", "q8_0"],
        typer.Option(
            help="of what is written: all weights of a folder, the adapted layers of a merged GGUF "
            "file, or the adapter; q8_0 is for GGUF files"
        ),
    ] = "fp32",
    model: Annotated[str | None, typer.Option(help="the base model, if it has moved")] = None,
    json: Json = False,
) -> None:
    """Write a finished run's adapter merged into its base or as a GGUF file, or upload it."""
    if push is not None:
        if (merged, gguf, model, dtype) != (None, None, None, "fp32"):
            raise ConfigError("--push uploads the adapter folder as it is: leave out other options")
        _push(path, push, json)
        return
    from rolora.run import export

    with working("loading the base and writing"):
        export.export(path, merged=merged, gguf=gguf, dtype=dtype, model=model, notify=note)
    made = {"merged": merged, "gguf": gguf}
    written = {form: str(out) for form, out in made.items() if out is not None}
    show(json, written, *(printable(f"wrote {out}") for out in written.values()))


def _push(path: Path, name: str, json: bool) -> None:
    """Say what will be uploaded, and upload it if the answer is yes."""
    from rolora.model import hub
    from rolora.run.evaluation import adapter_folder, read_notes

    folder = adapter_folder(path)
    read_notes(folder)
    with working("asking the hub"):
        planned = hub.prepare(folder, name)
    owner, _, _ = name.partition("/")
    readers = f"only {owner} can read" if owner == planned.account else f"members of {owner} read"
    where = {
        None: f"a new private repository, which {readers}",
        True: f"a private repository that exists, which {readers}",
        False: "a PUBLIC repository that exists, which anyone can read",
    }[planned.private]
    files = ", ".join(file.path_in_repo for file in planned.files)
    for line in (
        f"to       {planned.endpoint}/{name}, {where}",
        f"as       {planned.account}",
        f"upload   {len(planned.files)} files, {planned.megabytes:.2f} MB, of {folder}: {files}",
    ):
        err_console.print(printable(line))
    typer.confirm("Upload?", abort=True, err=True)
    address = hub.upload(planned)
    show(json, {"pushed": address}, printable(f"uploaded to {address}"))
