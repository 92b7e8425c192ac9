"""A program on its way from the API server to the workers: an Arrow stream, a row for each rule and neuron named.

Dense arrays of an 8B model would be 22 MB a rule, most of them naming nothing.
"""

import numpy as np
import pyarrow as pa

from neuronlens.programs import Program, SiteProgram

_SCHEMA = pa.schema(
    [
        ("site", pa.int32()),
        ("row", pa.int32()),
        ("neuron", pa.int32()),
        *((name, pa.float64()) for name in ("lower", "upper", "a", "b", "g", "centre")),
    ]
)


def pack(program: Program) -> bytes:
    """The program's arrays; its rules themselves stay behind, but for their number."""
    tables, sites = [], []
    for place, site in enumerate(program.sites):
        row_K, neuron_K = np.nonzero(site.lower_RN <= site.upper_RN)
        columns: dict[str, np.ndarray] = {
            "site": np.full(len(row_K), place, np.int32),
            "row": row_K.astype(np.int32),
            "neuron": neuron_K.astype(np.int32),
        }
        for name in ("lower", "upper", "a", "b", "g", "centre"):
            values_RN = getattr(site, f"{name}_RN")
            columns[name] = np.zeros(len(row_K)) if values_RN is None else values_RN[row_K, neuron_K]
        tables.append(pa.table(columns, schema=_SCHEMA))
        rules = " ".join(map(str, site.rule_R.tolist()))
        sites.append(f"{site.hook_point}|{site.layer}|{site.width}|{int(site.g_RN is not None)}|{rules}")
    table = pa.concat_tables(tables).replace_schema_metadata({"sites": "\n".join(sites)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def unpack(data: bytes) -> tuple[SiteProgram, ...]:
    """The sites of a packed program: what `Program.sites` was."""
    table = pa.ipc.open_stream(data).read_all()
    site_K = table["site"].to_numpy()
    columns = {name: table[name].to_numpy() for name in _SCHEMA.names[1:]}
    sites = []
    for place, line in enumerate(table.schema.metadata[b"sites"].decode().split("\n")):
        hook_point, layer, width, is_adaptive, rules = line.split("|")
        here = slice(*np.searchsorted(site_K, [place, place + 1]))
        rule_R = np.array([int(rule) for rule in rules.split()])
        at = columns["row"][here], columns["neuron"][here]

        def spread(name: str, elsewhere: float, shape: tuple[int, int] = (len(rule_R), int(width)),
                   at: tuple[np.ndarray, np.ndarray] = at, here: slice = here) -> np.ndarray:  # fmt: skip
            values_RN = np.full(shape, elsewhere)
            values_RN[at] = columns[name][here]
            return values_RN

        sites.append(
            SiteProgram(
                hook_point=hook_point,
                layer=int(layer),
                rule_R=rule_R,
                lower_RN=spread("lower", np.inf),
                upper_RN=spread("upper", -np.inf),
                a_RN=spread("a", 0.0),
                b_RN=spread("b", 0.0),
                g_RN=spread("g", 0.0) if int(is_adaptive) else None,
                centre_RN=spread("centre", 0.0) if int(is_adaptive) else None,
            )
        )
    return tuple(sites)
