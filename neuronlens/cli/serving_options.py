"""The options that serve and deploy have in common."""

from typing import Annotated

import typer

SourcesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="SOURCES...", help="Stores, and folders of single range tables.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", help="The model, a folder or a hub id [default: the one that the store names].")
]
TablesOnlyOption = Annotated[bool, typer.Option("--tables-only", help="Serve range tables and cards, no text.")]
NoAuthOption = Annotated[
    int, typer.Option("--no-auth", count=True, help="Twice: listen on a public address without keys.")
]
RevisionOption = Annotated[str | None, typer.Option("--revision", help="Of a hub model.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
ChatTemplateOption = Annotated[
    str | None,
    typer.Option("--chat-template", help="A Jinja file, or plain: the texts in a row [default: the tokenizer's own]."),
]
AllowOriginOption = Annotated[
    list[str] | None,
    typer.Option("--allow-origin", help="A web origin whose pages may call the server. Repeatable."),
]
LogPromptsOption = Annotated[bool, typer.Option("--log-prompts", help="Put prompts and answers into the log.")]
