"""Parity with numbers that the public releases of Rein and SET computed (float32, CPU): the same functions."""

from pathlib import Path

import numpy as np
import pytest

from setlib import __main__ as cli
from setlib.release.parity import TOLERANCE, verify

TOKENS = Path(__file__).parent / "golden" / "token_modules.npz"
HEAD = Path(__file__).parent / "golden" / "mask2former_head.npz"


def changed(folder, file, key, change=None):
    """A copy of a golden file with one array changed, or left out."""
    values = dict(np.load(file))
    value = values.pop(key)
    np.savez(folder / "changed.npz", **values | ({key: change(value)} if change else {}))
    return folder / "changed.npz"


def test_outputs_queries_gradients_and_masks_are_the_releases(capsys):
    assert cli.main(["verify", str(TOKENS), str(HEAD)]) == 0
    rows = verify(TOKENS) + verify(HEAD)
    assert max(row["difference"] for row in rows) < TOLERANCE
    items = {row["item"] for row in rows}
    for module, gradients in (("rein", 7), ("released_set", 12)):
        assert {f"{module}/output/B{b}/layer{layer}" for b in (1, 2, 4) for layer in range(3)} <= items
        assert f"{module}/queries" in items and f"{module}/grad_input/B2/layer1" in items
        assert sum(item.startswith(f"{module}/grad/") for item in items) == gradients
    assert {f"{kind}_logits/50x93/stage{stage}" for kind in ("class", "mask") for stage in range(4)} <= items


@pytest.mark.parametrize(
    ("file", "key"),
    [
        (TOKENS, "rein/output/B4/layer2"),
        (TOKENS, "released_set/grad/learnable_tokens2"),
        (TOKENS, "rein/queries"),
        (HEAD, "mask_logits/50x93/stage2"),
        (HEAD, "class_logits/50x93/stage0"),
    ],
)
def test_a_difference_is_found(tmp_path, file, key, capsys):
    path = changed(tmp_path, file, key, lambda value: value + 1e-3 * np.abs(value).clip(1))
    assert [row["item"] for row in verify(path) if row["difference"] > TOLERANCE] == [key]
    assert cli.main(["verify", str(path)]) == 1
    assert key in capsys.readouterr().err


def test_a_changed_parameter_is_found(tmp_path):
    key = "param/decode_head.pixel_decoder.encoder.layers.1.ffn.layers.1.weight"
    assert max(row["difference"] for row in verify(changed(tmp_path, HEAD, key, lambda value: 1.1 * value))) > 1e-3


@pytest.mark.parametrize(
    ("file", "key", "change", "message"),
    [
        (TOKENS, "rein/param/merge.bias", lambda value: value[:-1], "merge.bias is .7,., expected .8,."),
        (TOKENS, "input/B2", None, "is not laid out as golden numbers are"),
        (HEAD, "input/50x93/3", None, "is not laid out as golden numbers are"),
        (HEAD, "queries", None, "is not laid out as golden numbers are"),
    ],
)
def test_a_file_that_lacks_something_is_one_sentence(tmp_path, file, key, change, message):
    with pytest.raises(ValueError, match=message):
        verify(changed(tmp_path, file, key, change))


def test_what_is_no_golden_file_is_one_sentence(tmp_path, capsys):
    (tmp_path / "text.npz").write_text("no archive")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name, words in (("text.npz", "cannot be read as an npz"), ("other.npz", "holds no golden numbers")):
        assert cli.main(["verify", str(tmp_path / name)]) == 2
        assert words in capsys.readouterr().err
