"""Words as steering: ridge in closed form, diffusion from a seed, encoders of any kind, files, and what it brings."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

import fxfeedback
import steer_by_words
from fxfeedback import Prototypes, TextPrior
from fxfeedback.errors import CheckpointError, InputError, OptionError
from fxfeedback.prototypes.moments import Moments
from fxfeedback.text import ridge

LABELS = 6


def known(shape=(5,), seed=0, source="head"):
    """Prototypes and embeddings (classes, 3, 4) that a linear map and a little noise connect."""
    generator = torch.Generator().manual_seed(seed)
    of_class = torch.randn(LABELS, 4, generator=generator, dtype=torch.float64)
    embeddings = of_class[:, None] + 0.1 * torch.randn(LABELS, 3, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, int(np.prod(shape)), generator=generator, dtype=torch.float64)
    means = (of_class @ weight).view(LABELS, *shape) + 2
    return Prototypes({k: Moments(1, {source: means[k]}, {source: 0 * means[k]}) for k in range(LABELS)}), embeddings


# --- ridge


@pytest.mark.parametrize("penalty", [0.01, 0.1, 10.0])
def test_the_errors_of_classes_left_out_are_those_of_fits_without_them(penalty):
    generator = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    x, y = (torch.randn(10, n, generator=generator, dtype=torch.float64) for n in (7, 3))
    by_hand = []
    for group in range(4):
        rows = groups != group
        weight, bias = ridge.solve(x[rows], y[rows], penalty)
        by_hand.append((x[~rows] @ weight + bias - y[~rows]).square().sum(1).mean())
    torch.testing.assert_close(
        ridge.left_out_errors(x, y, groups, penalty), torch.stack(by_hand), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_ridge_is_the_least_of_its_sum(penalty):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    weight, bias = (part.requires_grad_() for part in ridge.solve(x, y, penalty))
    ((x @ weight + bias - y).square().sum() + penalty * weight.square().sum()).backward()
    assert weight.grad.abs().max() < 1e-9 and bias.grad.abs().max() < 1e-9


def test_a_linear_relation_is_found_also_for_a_class_left_out():
    prototypes, embeddings = known()
    prior = TextPrior.fit({k: embeddings[k] for k in range(LABELS - 1)}, prototypes)
    assert (prior.kind, prior.source, prior.shape, prior.size) == ("ridge", "head", (5,), 4)
    made = prior(embeddings[-1]).mean(0)
    assert torch.nn.functional.cosine_similarity(made, prototypes.mean(LABELS - 1), dim=0) > 0.97


# --- diffusion


@pytest.fixture(scope="module")
def diffusion():
    prototypes, embeddings = known((2, 3))
    state = torch.random.get_rng_state()
    prior = TextPrior.fit(embeddings, prototypes, "diffusion", steps=400, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    return prior, prototypes, embeddings


@pytest.mark.long
def test_diffusion_makes_prototypes_of_noise(diffusion):
    prior, prototypes, embeddings = diffusion
    for k in range(LABELS):
        made, mean = prior(embeddings[k]).mean(0), prototypes.mean(k)
        assert made.shape == (2, 3) and (made - mean).norm() < 0.3 * (mean - 2).norm()
    assert torch.equal(prior(embeddings[0], seed=3), prior(embeddings[0], seed=3))
    assert not torch.equal(prior(embeddings[0], seed=3), prior(embeddings[0], seed=4))
    each = torch.cat([prior(row[None]) for row in embeddings[1]])
    torch.testing.assert_close(prior(embeddings[1]), each, rtol=1e-4, atol=1e-5)
    again = TextPrior.fit(embeddings, prototypes, "diffusion", steps=400, seed=1)
    assert torch.equal(again(embeddings[0]), prior(embeddings[0]))


# --- steering


def encoder(texts):
    """A vector per text that depends on its letters alone."""
    return [[float(text.count(letter)) for letter in "aeio"] for text in texts]


def test_words_steer_as_their_activations_do():
    prototypes, _ = known()
    prior = TextPrior.fit({0: torch.eye(4)[0], 1: torch.eye(4)[1:3], 2: torch.eye(4)[3]}, prototypes)
    table = torch.tensor(encoder(["a photo", "bee"]), dtype=torch.float64)
    steering = prior.steering("a photo", 2.0, 0.5, encoder=encoder)
    assert (steering.source, steering.strength, steering.alpha) == ("head", 2.0, 0.5)
    torch.testing.assert_close(steering.activation, prior(table[:1]))
    both = prior.steering(["a photo", "bee"], encoder=encoder).activation
    torch.testing.assert_close(both, prior(table).mean(0, keepdim=True))
    torch.testing.assert_close(prior.steering(table).activation, prior(table))  # one per image
    torch.testing.assert_close(prior.steering(table[0]).activation, prior(table[:1]))
    words = prior.prototypes({7: "a photo", "b": ["bee", "a photo"]}, encoder)
    torch.testing.assert_close(words.mean(7), prior(table)[0])
    torch.testing.assert_close(words.mean("b"), prior(table).mean(0))
    assert words.sources == ["head"] and words.count("b") == 2


def test_a_map_s_prior_steers_a_network():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    model = fxfeedback.add_feedback(net, [("3", "1")], input_size=(1, 8, 8)).eval()
    x, labels = torch.randn(12, 1, 8, 8), torch.arange(12) % 4
    prototypes = Prototypes.compute(model, [(x, labels)])
    prior = TextPrior.fit(torch.randn(4, 6), prototypes)
    assert prior.shape == (2, 4, 4)
    assert not torch.equal(model(x, steering=prior.steering(torch.randn(12, 6)))[-1], model(x)[-1])


def test_open_clip_encodes_words():
    open_clip = pytest.importorskip("open_clip")
    name, templates = "ViT-S-32-alt", ("a photo of a {}.", "the {}")
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None).eval()
    encode = fxfeedback.text.clip(name, None, templates=templates, model=model)
    made = encode(["dog", "cat"])
    assert made.shape == (2, 256) and made.dtype == torch.float32 and not made.requires_grad
    tokens = open_clip.get_tokenizer(name)(["a photo of a cat.", "the cat"])
    with torch.no_grad():
        each = nn.functional.normalize(model.encode_text(tokens), dim=1)
    torch.testing.assert_close(made[1], nn.functional.normalize(each.mean(0), dim=0))
    prototypes, _ = known()
    prior = TextPrior.fit({k: encode([str(k)]) for k in range(3)}, prototypes)
    assert prior.steering("dog", encoder=encode).activation.shape == (1, 5)
    with pytest.raises(OptionError, match="one or several strings with"):
        fxfeedback.text.clip(name, None, templates=["a photo"], model=model)


def test_without_open_clip_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'fxfeedback\[text\]'"):
        fxfeedback.text.clip()


# --- mistakes


PROTOTYPES, EMBEDDINGS = known()
WRONG = {
    "kind": (lambda: TextPrior.fit(EMBEDDINGS, PROTOTYPES, "lasso"), OptionError, "choose one of 'ridge', 'diffusion'"),
    "two classes": (lambda: TextPrior.fit({0: [1.0], 1: [2.0]}, PROTOTYPES), OptionError, "three classes or more"),
    "other classes": (lambda: TextPrior.fit(EMBEDDINGS[:4], PROTOTYPES), InputError, "of the 6 classes in order"),
    "unknown class": (lambda: TextPrior.fit({9: EMBEDDINGS[0]}, PROTOTYPES), InputError, "no prototype of 9"),
    "widths": (
        lambda: TextPrior.fit({0: [1.0, 2.0], 1: [1.0]}, PROTOTYPES),
        InputError,
        r"embeddings of 1 have shape \(1, 1\), not \(2,\) or \(n, 2\)",
    ),
    "NaN": (lambda: TextPrior.fit(EMBEDDINGS / 0, PROTOTYPES), InputError, "of 0 are not finite"),
    "another encoder": (
        lambda: prior().steering("dog", encoder=lambda texts: torch.ones(len(texts), 9)),
        InputError,
        r"takes embeddings \(N, 4\), not \(1, 9\): is the encoder another",
    ),
    "no encoder": (lambda: prior().steering("dog"), InputError, "pass encoder="),
    "no text": (lambda: prior().steering([], encoder=encoder), InputError, "one or several strings"),
    "no strings": (lambda: prior().steering([1], encoder=encoder), InputError, r"strings to encode, not \[1\]"),
    "one row too few": (
        lambda: prior().steering(["a", "b"], encoder=lambda texts: torch.ones(1, 4)),
        InputError,
        r"shape \(1, 4\) for 2 texts",
    ),
    "an encoder's NaN": (
        lambda: prior().steering("a", encoder=lambda texts: torch.full((1, 4), torch.nan)),
        InputError,
        "the encoder gives embeddings that are not finite",
    ),
    "no embeddings": (lambda: prior().steering("a", encoder=lambda texts: "b"), InputError, "gives a str"),
    "which node": (
        lambda: TextPrior.fit(EMBEDDINGS, PROTOTYPES, source="tail"),
        fxfeedback.errors.NodeNameError,
        "no prototypes of 'tail'",
    ),
}


def prior():
    return TextPrior.fit(EMBEDDINGS, PROTOTYPES)


@pytest.mark.parametrize("mistake", WRONG)
def test_mistakes_are_told(mistake):
    make, error, message = WRONG[mistake]
    with pytest.raises(error, match=message) as caught:
        make()
    assert isinstance(caught.value, fxfeedback.Error)


# --- files


@pytest.mark.parametrize("kind", ["ridge", "diffusion"])
def test_priors_come_back_from_files_that_are_checked(kind, tmp_path):
    prototypes, embeddings = known((2, 3), source="a.b")
    fitted, path = TextPrior.fit(embeddings, prototypes, kind, steps=3), tmp_path / "prior.safetensors"
    with pytest.raises(CheckpointError, match="there is no file"):
        TextPrior.load(path)
    with pytest.raises(OptionError, match=r"written to a \.safetensors file"):
        fitted.save(tmp_path / "prior.pth")
    fitted.save(path)
    back = TextPrior.load(path)
    assert repr(back) == repr(fitted) and torch.equal(back(embeddings[0]), fitted(embeddings[0]))
    whole, tensors = path.read_bytes(), safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["fxfeedback_prior"])
    name = next(iter(tensors))
    broken = [
        (tensors, None, "was not written by"),
        (tensors, {**about, "format": 2}, "a later version is needed"),
        (tensors, {**about, "kind": "lasso"}, "kind and source"),
        (tensors, {**about, "shape": 6}, "its sizes"),
        (tensors, {**about, "shape": [-2, -3]}, "its sizes"),
        (tensors, {**about, "shape": [2**30, 2**30]}, "its sizes"),
        (tensors, {**about, "size": 2**30}, "is not what save writes"),
        (tensors, {**about, "shape": [7]}, "is not what save writes"),
        ({**tensors, "more": tensors[name].clone()}, about, "its tensors are not"),
        ({**tensors, name: tensors[name] / 0}, about, "is not what save writes"),
        ({**tensors, name: tensors[name].half()}, about, "is not what save writes"),
    ]
    for changed, told, message in broken:
        safetensors.torch.save_file(changed, path, told and {"fxfeedback_prior": json.dumps(told)})
        with pytest.raises(CheckpointError, match=message):
            TextPrior.load(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        TextPrior.load(path)


# --- the job, and the promise


def shares(out: Path) -> list[float]:
    """Of every seed and strength, the gain by words over that by pictures."""
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    gains = {(r["made_from"], r["seed"], r["strength"]): float(r["gain"]) for r in rows}
    return [gain / gains["pictures", *rest] for (made_from, *rest), gain in gains.items() if made_from == "words"]


@pytest.mark.long
def test_the_job_writes_its_results(tmp_path, capsys):
    flags = ["--steps", "5", "--batch-size", "16", "--test-size", "20", "--strengths", "1.5", "--device", "cpu"]
    assert steer_by_words.main([*flags, "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"results.csv", "prior-0.safetensors"}
    with (tmp_path / "results.csv").open() as file:
        assert [row["made_from"] for row in csv.DictReader(file)] == ["pictures", "words"]
    prior = TextPrior.load(tmp_path / "prior-0.safetensors")
    assert prior.source == "head" and prior.shape == (10,)
    assert "by words in held-out sentences; ridge, letters" in capsys.readouterr().out


@pytest.mark.sweep
def test_words_reach_nine_tenths_of_the_gain_of_prototypes(tmp_path):
    flags = ["--steps", "150", "--test-size", "300", "--strengths", "1.5", "3", "--device", "cpu", "--repeat", "5"]
    assert steer_by_words.main([*flags, "--out", str(tmp_path)]) == 0
    found = shares(tmp_path)
    for of_strength in (found[::2], found[1::2]):
        mean, half = steer_by_words.mean_and_interval(of_strength)
        assert len(of_strength) == 5 and mean - half > 0.9
