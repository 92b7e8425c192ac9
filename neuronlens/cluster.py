"""Ray: our own on this machine, or the cluster that an address names.

    with ray_cluster() as is_ours: ...                      # RAY_ADDRESS, else our own
    with ray_cluster("ray://head:10001") as is_ours: ...

Ray is ours unless an address is given: it would join any cluster that it finds on the machine, with other cores and
other lifetimes.
"""

import contextlib
import os
from collections.abc import Iterator

from neuronlens.errors import UsageError

ADDRESS_VARIABLE = "RAY_ADDRESS"


@contextlib.contextmanager
def ray_cluster(address: str | None = None, *, n_cpus: int | None = None) -> Iterator[bool]:
    """Ray, until the context ends; True where we started it, and then it ends with the context, too.

    Raises UsageError where no cluster answers at the address.
    """
    import ray

    named = address or os.environ.get(ADDRESS_VARIABLE)
    if named:
        _join(named, origin="--address " if address else f"{ADDRESS_VARIABLE}=")
    else:
        ray.init(
            address="local",
            num_cpus=n_cpus,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
            configure_logging=True,
        )
    try:
        yield not named
    finally:
        ray.shutdown()


def _join(address: str, origin: str) -> None:
    import ray

    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False)
    except (ray.exceptions.AuthenticationError, ConnectionError, ValueError) as error:
        raise UsageError(
            f"No Ray cluster lets us in at {origin}{address} ({str(error).strip().splitlines()[0]}). Expected the "
            "address of a running head, such as 10.0.0.1:6379; where the cluster wants a token, set "
            "RAY_AUTH_MODE=token. Without an address, Ray is started on this machine."
        ) from error
