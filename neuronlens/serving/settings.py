"""What a server is started with, beyond its model and its tables."""

from pydantic import BaseModel, ConfigDict, Field


class Limits(BaseModel):
    """How much one request, and all of them together, may ask for. Beyond a limit the answer is a 4xx that names it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    body_bytes: int = Field(default=2_000_000, gt=0)
    """Of any request but an upload: 413."""
    body_seconds: float = Field(default=30, gt=0)
    """How long a client may take to send its body: 408."""
    upload_bytes: int = Field(default=256_000_000, gt=0)
    """Of an uploaded table: 413."""
    upload_rows: int = Field(default=20_000_000, gt=0)
    """Of an uploaded table: 413."""
    prompt_tokens: int | None = Field(default=None, gt=0)
    """Of one prompt; None: the model's window decides. 400."""
    max_tokens: int | None = Field(default=None, gt=0)
    """That a request may ask to generate; None: the model's window decides. 400."""
    sequences: int = Field(default=32, gt=0)
    """Prompts times n, of one request. 400."""
    rules: int = Field(default=16, gt=0)
    """Of one intervention. 400."""
    programs: int = Field(default=64, gt=0)
    """Distinct programs that are at work or waiting: 429."""
    queue: int = Field(default=512, gt=0)
    """Sequences that wait for a place in the batch: 429."""
    request_seconds: float = Field(default=600, gt=0)
    """From a request's arrival to its last token: 408, or an error as the stream's last event."""


class Settings(BaseModel):
    """How a server behaves. Frozen: a server is restarted with other settings, not changed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limits: Limits = Limits()
    log_prompts: bool = False
    """Put prompts and answers into the log, which is otherwise free of them."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of pages whose scripts may call the server (CORS)."""
    trusted_hosts: tuple[str, ...] = ("*",)
    """Host headers that are answered; a server on a loopback address without a key takes only the loopback's names, so
    that no web page reaches it under a name of its own."""
