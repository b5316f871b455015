"""Reads the flags of the kinds `units` and `dream` of `visualize`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import flags

from flax_cnns.errors import UserError
from flax_cnns.files import check_regular_file

if TYPE_CHECKING:
    import numpy as np

    from flax_cnns.runs.subject import Subject

FLAGS = flags.FLAGS


def draw_units(subject: Subject, out: str, photos: list[str]) -> None:
    from flax_cnns.runs.visualize import units

    if FLAGS.parameters != "maco":
        for flag_name in ("crops", "crop-size", "images", "split"):
            if FLAGS[flag_name].present:
                raise UserError(f"units takes no --{flag_name} without --parameters=maco")
        if photos:
            raise UserError("units takes no photos without --parameters=maco")
    if FLAGS.direction and (FLAGS["units"].present or FLAGS["objective"].present):
        raise UserError("--direction replaces --units and --objective: give one of them")
    if not FLAGS.direction and FLAGS.objective not in ("channel", "neuron"):
        raise UserError(f"--objective: expected channel or neuron, got {FLAGS.objective!r}")
    if FLAGS.diverse and FLAGS.count == 1:
        raise UserError("--diverse: expected --count of at least 2")
    units.draw_units(
        subject,
        out,
        FLAGS.path.split(","),
        [int(unit) if unit.isdecimal() else unit for unit in FLAGS.units],
        objective=FLAGS.objective,
        directions=_read_directions(FLAGS.direction) if FLAGS.direction else None,
        kind=FLAGS.parameters,  # type: ignore[arg-type]
        steps=FLAGS.steps or None,
        rate=FLAGS.rate or None,
        size=FLAGS.size,
        count=FLAGS.count,
        diverse=FLAGS.diverse,
        crops=FLAGS.crops,
        crop_size=FLAGS["crop-size"].value or 0,
        seed=FLAGS.seed,
    )


def _read_directions(path: str) -> np.ndarray:
    """Returns the numbers [C] or [K C] of a .npy file. Raises UserError."""
    import numpy as np

    check_regular_file(path)
    try:
        found = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--direction: cannot read {path} as a .npy file") from error
    if (
        not isinstance(found, np.ndarray)
        or found.dtype.kind not in "fiu"
        or found.ndim not in (1, 2)
    ):
        raise UserError(f"--direction: {path}: expected numbers [C] or [K C]")
    return found.astype(np.float32)


def draw_dream(subject: Subject, out: str, photos: list[str]) -> None:
    from flax_cnns.runs.visualize import units

    if len(photos) > 1:
        raise UserError(f"dream takes one photo, got {len(photos)}")
    units.draw_dream(
        subject,
        out,
        FLAGS.path,
        photo=photos[0] if photos else None,
        unit=None if FLAGS.unit < 0 else FLAGS.unit,
        octaves=FLAGS.octaves or None,
        steps=FLAGS.steps or 10,
        rate=FLAGS.rate or 0.01,
        tile=FLAGS.tile,
        seed=FLAGS.seed,
    )
