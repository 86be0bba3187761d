"""Parity with numbers that the public releases of Rein and SET computed (float32, CPU): the same functions."""

from pathlib import Path

import numpy as np
import pytest

from setlib import __main__ as cli
from setlib import release

GOLDEN = Path(__file__).parent / "golden" / "token_modules.npz"


def spoil(folder, key, change):
    values = dict(np.load(GOLDEN))
    values[key] = change(values[key])
    np.savez(folder / "spoilt.npz", **values)
    return folder / "spoilt.npz"


def test_outputs_queries_and_gradients_are_the_releases():
    rows = release.verify(GOLDEN)
    assert max(row["difference"] for row in rows) < release.TOLERANCE
    items = {row["item"] for row in rows}
    for module, gradients in (("rein", 7), ("released_set", 12)):
        assert {f"{module}/output/B{b}/layer{layer}" for b in (1, 2, 4) for layer in range(3)} <= items
        assert f"{module}/queries" in items and f"{module}/grad_input/B2/layer1" in items
        assert sum(item.startswith(f"{module}/grad/") for item in items) == gradients


@pytest.mark.parametrize("key", ["rein/output/B4/layer2", "released_set/grad/learnable_tokens2", "rein/queries"])
def test_a_difference_is_found(tmp_path, key, capsys):
    path = spoil(tmp_path, key, lambda value: value + 1e-3)
    assert [row["item"] for row in release.verify(path) if row["difference"] > release.TOLERANCE] == [key]
    assert cli.main(["verify", str(GOLDEN)]) == 0
    assert cli.main(["verify", str(path)]) == 1
    assert key in capsys.readouterr().err


def test_what_is_no_golden_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name, words in (("text.npz", "cannot be read as an npz"), ("other.npz", "holds no golden numbers")):
        assert cli.main(["verify", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err


def test_parameters_that_do_not_fit_are_named(tmp_path):
    with pytest.raises(ValueError, match="Unknown parameter 'learnable'"):
        release.our_name("learnable", "phase")
    with pytest.raises(ValueError, match="do not fit rein: .*size mismatch"):
        release.verify(spoil(tmp_path, "rein/param/merge.bias", lambda value: value[:-1]))
