"""`compare_passes`, and the forms in which `readout` takes names."""

import matplotlib
import numpy as np
import pytest
import torch

import fxfeedback
from fxfeedback.errors import NodeNameError, OptionError
from networks import build

NODES = ["2", "5", "10"]


def connected():
    net, x = build("convnet", train=False)
    return fxfeedback.add_feedback(net, [("8", "5"), ("10", "2")], 3, input_size=(2, 6, 6)).double(), x


def test_readout_takes_names_in_every_form():
    model, x = connected()
    whole = model.readout(x, NODES)
    assert isinstance(whole, list) and [list(one) for one in whole] == [NODES] * 3
    for given in ((x, *NODES), (x, tuple(NODES)), (x, "2", ["5", "10"])):
        for one, other in zip(whole, model.readout(*given), strict=True):
            assert all(torch.equal(one[name].value, other[name].value) for name in NODES)
    assert [list(one) for one in model.readout(x, "10")] == [["10"]] * 3


@pytest.mark.parametrize("form", [lambda names: names, lambda names: [names]])
def test_cosine_and_rsa_are_numpys(form):
    model, x = connected()
    found = fxfeedback.compare_passes(model, x, *form(NODES))
    read = model.readout(x, NODES)
    for name in NODES:
        values = [one[name].value.flatten(1).detach().numpy() for one in read]
        apart = [1 - np.corrcoef(v)[np.triu_indices(len(x), 1)] for v in values]
        for i, a in enumerate(values):
            for j, b in enumerate(values):
                cosine = np.mean(
                    [
                        u @ v / np.sqrt(u @ u * (v @ v)) if u.any() and v.any() else not (u.any() or v.any())
                        for u, v in zip(a, b, strict=True)
                    ]
                )
                assert found.cosine[name][i, j] == pytest.approx(cosine, abs=1e-9)
                assert found.rsa[name][i, j] == pytest.approx(
                    np.corrcoef(apart[i], apart[j])[0, 1], abs=1e-9, nan_ok=True
                )
    assert len(list(found.rows())) == 9 and str(found).count("\n") == 9 and "cosine" in str(found)


def test_where_no_connection_acts_passes_are_alike_and_a_plot_shows_it():
    matplotlib.use("agg")
    model, x = connected()
    found = fxfeedback.compare_passes(model, x, "0", passes=2)
    torch.testing.assert_close(found.cosine["0"], torch.ones(2, 2).double())
    torch.testing.assert_close(found.rsa["0"], torch.ones(2, 2).double())
    assert [line.get_label() for line in found.plot().get_lines()] == ["0, cosine", "0, rsa"]
    two = fxfeedback.compare_passes(model, x[:2], "0")
    assert two.rsa["0"].isnan().all() and not two.cosine["0"].isnan().any()


def test_what_cannot_be_compared():
    model, x = connected()
    with pytest.raises(NodeNameError, match="no node is named"):
        fxfeedback.compare_passes(model, x)
    with pytest.raises(OptionError, match="a ReLU has no passes"):
        fxfeedback.compare_passes(torch.nn.ReLU(), x, "0")
