"""Steer a network with feedback by words: a prior maps the embedding of "seven" to what the network shows of sevens.

A small network is trained on digits as in `steer_composites.py`. A prior learns from words for the ten digits, in some
sentences; the composite challenge then compares steering by other sentences with steering by the digits' prototypes.

    python examples/steer_by_words.py --repeat 5             # means and 95 % confidence intervals over five seeds
    python examples/steer_by_words.py --encoder clip         # CLIP's embeddings; open_clip downloads its weights

Without `--encoder clip` words are encoded by the groups of letters in them. Such an encoder knows spelling and no
meaning: it finds "seven" again in any sentence, but of "heptad" it knows nothing, and a prior that is fitted on it
steers only by words that it was fitted on. CLIP's knows what words mean, as far as pictures show it.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from torch.utils.data import TensorDataset
from tqdm import tqdm

import fxfeedback
import steer_composites
from fxfeedback.composites import TripletDataset, steerability
from fxfeedback.text.encoders import Encoder, encoded
from jobs import UserError, exit_code, make_folder, usable_device, write_whole
from multi_mnist import SPLIT_SEED, DataError, embedded_digits
from steer_composites import COLUMNS, SOURCE, as_csv, mean_and_interval

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SEEN = ("{}", "a photo of the digit {}", "the number {}", "a handwritten {}", "a picture of a {}")
HELD_OUT = ("a photo of the number {}", "a drawing of the digit {}", "look for the {}", "find {}")
MADE_FROM = ("pictures", "words")


def sentences(templates: Sequence[str]) -> dict[int, list[str]]:
    """Digit -> sentences with its name, and with its numeral."""
    return {k: [one.format(name) for one in templates for name in (WORDS[k], str(k))] for k in range(10)}


def letters(texts: Sequence[str]) -> Encoder:
    """An encoder by the groups of two to five letters that occur in the texts; it knows no meaning.

    Not normalised, so that the rest of a sentence adds to a word and does not make less of it.
    """
    return TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), norm=None).fit(texts).transform


def encoder_of(args: argparse.Namespace) -> Encoder:
    """The encoder that `args` names. Raises `UserError` where it cannot be had."""
    if args.encoder == "letters":
        return letters([text for several in sentences(SEEN).values() for text in several])
    try:
        return fxfeedback.text.clip(args.clip, args.clip_weights, templates=("{}",), device=args.device)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot use CLIP: {error}") from error


def run(args: argparse.Namespace, seed: int, encoder: Encoder) -> list[dict[str, Any]]:
    """Train a network and a prior; the challenge's rows, steered by pictures and by words in held-out sentences."""
    digits, held_out = embedded_digits()
    model = steer_composites.train(digits, args, seed)
    own = steer_composites.prototypes(model, digits)
    embeddings = {k: encoded(encoder, texts) for k, texts in sentences(SEEN).items()}
    prior = fxfeedback.TextPrior.fit(embeddings, own, args.kind, seed=seed)
    prior.save(args.out / f"prior-{seed}.safetensors")
    dataset = TensorDataset(steer_composites.normalised(held_out.images), held_out.labels)
    triplets = TripletDataset(dataset, args.test_size, "overlay", SPLIT_SEED, held_out.labels.tolist())
    rows = []
    for made_from, prototypes in zip(MADE_FROM, (own, prior.prototypes(sentences(HELD_OUT), encoder)), strict=True):
        for row in steerability(model, triplets, prototypes, args.strengths, source=SOURCE, progress=False):
            rows.append({"made_from": made_from, "training": args.training, "seed": seed, **row})
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """The gains in %, by strength, and what share of the one by pictures the one by words is; over the seeds."""
    text = [f"{'strength':>8}{'by pictures':>18}{'by words':>18}{'share':>16}{'hallucinated':>16}"]
    for strength in dict.fromkeys(row["strength"] for row in rows):
        of_strength = [row for row in rows if row["strength"] == strength]
        pictures, words = ([row for row in of_strength if row["made_from"] == name] for name in MADE_FROM)
        shares = [w["gain"] / p["gain"] if p["gain"] else 1.0 for p, w in zip(pictures, words, strict=True)]
        cells = [[100 * row["gain"] for row in pictures], [100 * row["gain"] for row in words], shares]
        cells.append([100 * row["hallucinated"] for row in words])
        written = []
        for values, digits in zip(cells, (1, 1, 3, 1), strict=True):
            mean, half = mean_and_interval(values)
            written.append(f"{mean:.{digits}f}" + ("" if half is None else f" ± {half:.{digits}f}"))
        text.append(f"{strength:8g}{written[0]:>18}{written[1]:>18}{written[2]:>16}{written[3]:>16}")
    return "\n".join(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line. Exits with a message when it is wrong."""
    parser = argparse.ArgumentParser(description="Steer a network with feedback by words, on two overlaid digits.")
    parser.add_argument("--kind", choices=["ridge", "diffusion"], default="ridge", help="of prior (default ridge)")
    parser.add_argument("--encoder", choices=["letters", "clip"], default="letters", help="of words (default letters)")
    parser.add_argument("--clip", default="ViT-B-16", help="open_clip's name of the model (default %(default)s)")
    parser.add_argument("--clip-weights", default="openai", help="open_clip's name of the weights, or a file")
    args = steer_composites.parse_arguments(argv, parser, "runs/steer_by_words")
    if args.data or args.data_root:
        parser.error("words are for the embedded digits: leave --data and --data-root out")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    args = parse_arguments(argv)

    def job() -> int:
        usable_device(args.device)
        make_folder(args.out)
        encoder, rows = encoder_of(args), []
        for seed in range(args.seed, args.seed + args.repeat):
            rows += run(args, seed, encoder)
            text = as_csv(rows, ("made_from", *COLUMNS))
            write_whole(args.out / "results.csv", lambda path, text=text: path.write_text(text))
        tqdm.write(report(rows))
        print(
            f"gains in %, {args.test_size} overlaid digits, by words in held-out sentences; {args.kind}, {args.encoder}"
        )
        return 0

    return exit_code(job, DataError, fxfeedback.Error)


if __name__ == "__main__":
    sys.exit(main())
