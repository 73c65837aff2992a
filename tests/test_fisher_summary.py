"""Where a Fisher lies: names to layers and kinds, sums, tables and the picture."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from architectures.families import FAMILIES
from matplotlib.image import imread
from rich.console import Console
from tiny_models import tiny_model

from fastforget.fisher import plot
from fastforget.fisher.names import Fisher
from fastforget.fisher.summary import KINDS, FisherSummary, Share, kind_of, place_of, remarks, summarise

METADATA = {"per": "example", "labels": "data", "loss": "mean", "examples": 1234, "truncated": 0, "skipped": 0}


def fisher_of(model, scale=1e-6) -> Fisher:
    generator = torch.Generator().manual_seed(0)
    return Fisher({n: scale * torch.rand(p.shape, generator=generator) for n, p in model.named_parameters()}, METADATA)


def printed(summary) -> str:
    console = Console(width=120, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    with console.file:
        console.print(summary)
    return console.export_text()


def drawn(monkeypatch, summary, path):
    """The picture, and the figure that it was drawn from."""
    from matplotlib.figure import Figure

    figures = []
    real = Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *a, **k: (figures.append(self), real(self, *a, **k))[1])
    assert summary.plot(path) == path
    return imread(path), figures[0]


# Names


@pytest.mark.parametrize(
    ("name", "place", "kind"),
    [
        ("model.embed_tokens.weight", "embedding", "embedding"),
        ("model.layers.11.self_attn.q_proj.weight", 11, "q"),
        ("model.layers.0.self_attn.k_proj.weight", 0, "k"),
        ("model.layers.0.self_attn.v_proj.weight", 0, "v"),
        ("model.layers.0.self_attn.o_proj.weight", 0, "o"),
        ("model.layers.0.self_attn.q_norm.weight", 0, "norm"),
        ("model.layers.0.self_attn.q_proj.bias", 0, "bias"),
        ("model.layers.0.mlp.gate_proj.weight", 0, "mlp gate"),
        ("model.layers.0.mlp.up_proj.weight", 0, "mlp up"),
        ("model.layers.0.mlp.down_proj.weight", 0, "mlp down"),
        ("model.layers.0.mlp.gate_up_proj.weight", 0, "mlp gate+up"),
        ("model.layers.0.mlp.gate.weight", 0, "router"),
        ("model.layers.0.mlp.shared_expert_gate.weight", 0, "router"),
        ("model.layers.0.mlp.experts.gate_up_proj", 0, "experts"),
        ("model.layers.0.mlp.experts.down_proj_bias", 0, "experts"),
        ("model.layers.3.block_sparse_moe.experts.7.w1.weight", 3, "experts"),
        ("model.layers.0.input_layernorm.weight", 0, "norm"),
        ("model.norm.weight", "final norm", "norm"),
        ("lm_head.weight", "head", "head"),
        ("lm_head.bias", "head", "bias"),
        ("transformer.wte.weight", "embedding", "embedding"),
        ("transformer.wpe.weight", "embedding", "embedding"),
        ("transformer.h.2.attn.c_attn.weight", 2, "qkv"),
        ("transformer.h.2.attn.c_proj.weight", 2, "o"),
        ("transformer.h.2.mlp.c_fc.weight", 2, "fc in"),
        ("transformer.h.2.mlp.c_proj.weight", 2, "fc out"),
        ("transformer.h.2.ln_1.weight", 2, "norm"),
        ("transformer.ln_f.bias", "final norm", "bias"),
        ("transformer.blocks.4.attn.Wqkv.weight", 4, "qkv"),
        ("gpt_neox.layers.1.attention.dense.weight", 1, "o"),
        ("gpt_neox.layers.1.mlp.dense_4h_to_h.weight", 1, "fc out"),
        ("gpt_neox.embed_in.weight", "embedding", "embedding"),
        ("embed_out.weight", "head", "head"),
        ("model.decoder.layers.5.fc1.weight", 5, "fc in"),
        ("bert.encoder.layer.1.attention.output.dense.weight", 1, "o"),
        ("bert.encoder.layer.1.output.dense.weight", 1, "fc out"),
        ("bert.embeddings.LayerNorm.weight", "embedding", "norm"),
        ("transformer.word_embeddings_layernorm.weight", "embedding", "norm"),
        ("backbone.layers.3.mixer.out_proj.weight", 3, "state space"),
        ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight", 1, "q lora_A"),
        ("model.layers.1.self_attn.q_proj.lora_B.default.bias", 1, "q lora_B"),
        ("model.layers.1.mlp.down_proj.lora_magnitude_vector.default.weight", 1, "mlp down lora_magnitude"),
        ("model.layers.1.mlp.experts.base_layer.lora_B.default.weight", 1, "experts lora_B"),
        ("model.embed_tokens.lora_embedding_A.default", "embedding", "embedding lora_A"),
        ("lm_head.lora_B.0.weight", "head", "head lora_B"),
        ("something.else", "other", "other"),
        ("weight", "other", "other"),
    ],
)
def test_a_name_says_place_and_kind(name, place, kind):
    assert (place_of(name), kind_of(name)) == (place, kind)


COMMON = ["Llama", "Qwen2", "Qwen3", "Qwen3-MoE", "Gemma", "Gemma 2", "Gemma 3", "Mistral", "Mixtral", "Phi-3"]
COMMON += ["GPT-2", "GPT-J", "GPT-NeoX", "OPT", "Falcon", "BLOOM", "StarCoder2", "Mamba", "BERT, as a decoder"]


@pytest.mark.parametrize("family", COMMON)
def test_every_name_of_the_common_families_is_known(family):
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, config = FAMILIES[family]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if kind_of(name) == "other"] == []
    assert {0, 1, "embedding"} < {place_of(name) for name in names} <= {0, 1, "embedding", "final norm", "head"}
    assert "norm" in {kind_of(name) for name in names}


# Sums


def test_sums_and_means_by_place_and_kind():
    model = tiny_model()
    fisher = fisher_of(model)
    summary = summarise(fisher)
    assert summary.places == ["embedding", 0, 1, "final norm", "head"]
    assert summary.kinds == ["q", "k", "v", "o", "mlp gate", "mlp up", "mlp down", "norm", "embedding", "head"]
    parameters = sum(p.numel() for p in model.parameters())
    mass = sum(f.double().sum().item() for f in fisher.values())
    assert summary.total == Share(parameters, pytest.approx(mass))
    assert summary.total.mean == pytest.approx(mass / parameters, abs=0)
    layer = summary.by_place()[1]
    in_layer = [f.double() for name, f in fisher.items() if ".layers.1." in name]
    assert layer == Share(sum(f.numel() for f in in_layer), pytest.approx(sum(f.sum().item() for f in in_layer)))
    norms = [f for name, f in fisher.items() if "norm" in name]
    assert len(norms) == 5
    assert summary.by_kind()["norm"].parameters == 5 * 32
    assert summary.by_kind()["norm"].mass == pytest.approx(sum(f.double().sum().item() for f in norms))
    for parts in (summary.by_place(), summary.by_kind()):
        assert sum(share.parameters for share in parts.values()) == parameters
        assert math.fsum(share.mass for share in parts.values()) == pytest.approx(mass)
    assert set(summary.kinds) <= {*KINDS, "bias", "other"}
    assert repr(summary) == f"FisherSummary({parameters:,} parameters, mass {mass:.4g}, mean {mass / parameters:.4g})"


def test_an_adapters_parts_stand_beside_each_other():
    modules = ("self_attn.q_proj", "mlp.up_proj")
    fisher = {
        f"model.layers.{layer}.{module}.lora_{part}.default.weight": torch.full((3,), float(layer + 1))
        for layer in range(2)
        for part in "BA"
        for module in modules
    }
    summary = summarise(fisher)
    assert summary.places == [0, 1]
    assert summary.kinds == ["q lora_A", "q lora_B", "mlp up lora_A", "mlp up lora_B"]
    assert summary.cells[1, "q lora_B"] == Share(3, 6.0)


def test_values_that_are_not_finite_are_counted_and_left_out():
    broken = torch.tensor([1.0, math.nan, math.inf, -math.inf, 2.0])
    summary = summarise({"a.q_proj.weight": broken, "b.q_proj.weight": torch.ones(3), "c.weight": broken[1:4]})
    assert summary.by_kind()["q"] == Share(8, 6.0, 3)
    assert summary.by_kind()["q"].mean == 6 / 5
    assert math.isnan(summary.by_kind()["other"].mean)
    assert "6 values are NaN or infinite" in printed(summary)
    with pytest.raises(ValueError, match="fisher: expected at least one tensor, got none"):
        summarise({})


def test_a_sum_keeps_what_float32_would_lose():
    assert summarise({"a.weight": torch.tensor([1e8, *[1.0] * 100])}).total.mass == 1e8 + 100


def test_the_tables_show_every_row_and_the_remarks():
    fisher = fisher_of(tiny_model())
    fisher["lm_head.weight"] *= 100
    fisher.metadata |= {"truncated": 7, "skipped": 2, "failed": [{"id": "x", "where": "a.jsonl line 3"}] * 6}
    text = printed(summarise(fisher))
    for part in (
        "Diagonal Fisher of 1,234 examples, (nats per token / parameter)²", "layer 0", "layer 1", "final norm",
        "mlp down", "share of mass", "100.0%", "6 rows without a finite loss or gradient were left out",
        "first a.jsonl line 3 (id x), ", "7 examples of the data were truncated", "2 rows without a target token",
    ):  # fmt: skip
        assert part in text
    down, total = summarise(fisher).by_kind()["mlp down"], summarise(fisher).total
    cells = [
        "mlp down",
        f"{down.parameters:,}",
        f"{down.mass:.3e}",
        f"{down.mass / total.mass:.1%}",
        f"{down.mean:.3e}",
    ]
    (row,) = (line for line in text.splitlines() if "mlp down" in line)
    assert [cell.strip() for cell in row.strip("│ ").split("│")] == cells
    assert remarks({}) == []
    assert "(nats / parameter)²" in printed(summarise(Fisher(fisher, METADATA | {"loss": "sum"})))
    assert "(loss / parameter)²" in printed(summarise(dict(fisher)))


# The picture


def test_the_picture_says_what_it_shows(tmp_path, monkeypatch):
    fisher = fisher_of(tiny_model())
    fisher["model.layers.0.mlp.up_proj.weight"] *= 1e-3
    fisher["model.layers.1.self_attn.q_proj.weight"] *= 0
    fisher["model.layers.1.self_attn.v_proj.weight"] *= math.nan
    fisher["model.norm.weight"] *= 1e-30  # far below the scale
    summary = summarise(fisher)
    picture, figure = drawn(monkeypatch, summary, tmp_path / "new" / "f.png")
    main, side, bar = figure.axes
    assert figure.get_suptitle() == "Diagonal Fisher of 1,234 examples"
    assert bar.get_xlabel() == "mean F, (nats per token / parameter)²"
    assert [text.get_text() for text in main.get_yticklabels()] == ["embedding", "0", "1", "final norm", "head"]
    assert [text.get_text() for text in main.get_xticklabels()] == summary.kinds
    for part in ("per = example; labels = data; loss = mean", "grey: F = 0", "512 values are NaN or infinite"):
        assert part in figure.get_supxlabel()
    states, means = (image.get_array() for image in main.images)
    row, column = summary.places.index(0), summary.kinds.index("mlp up")
    assert means[row, column] == summary.cells[0, "mlp up"].mean
    assert means.mask[0, 0]  # the embedding has no q
    assert states[summary.places.index(1), summary.kinds.index("q")] == plot.ZERO
    assert states[summary.places.index(1), summary.kinds.index("v")] == plot.NONFINITE
    low, high = main.images[1].get_clim()
    assert high == max(share.mean for share in summary.cells.values() if np.isfinite(share.mean))
    assert low == pytest.approx(high / 10**plot.DECADES, abs=0)
    assert [bar.get_width() for bar in side.patches] == [share.mass for share in summary.by_place().values()]
    shown = [text.get_text() for text in side.texts]
    assert shown[3] == "<0.1%"
    assert sum(float(text.rstrip("%")) for text in shown if text[0] != "<") == pytest.approx(100, abs=0.3)
    # The colours of a zero cell, of a broken one and of the colour scale's upper end are there.
    for colour in ((0.7, 0.7, 0.7), (0.894, 0.102, 0.110), (0.993, 0.906, 0.144)):
        assert (np.abs(picture[..., :3] - colour).max(-1) < 0.02).mean() > 1e-3
    nothing_overlaps(figure)


def nothing_overlaps(figure):
    renderer = figure.canvas.get_renderer()
    main, side = figure.axes[:2]
    if len(figure.axes) > 2:  # the colour bar has a place of its own, and rows stay side by side
        boxes = [axes.get_tightbbox(renderer) for axes in figure.axes]
        assert boxes[2].y1 <= min(boxes[0].y0, boxes[1].y0)
        assert main.get_position().intervaly == pytest.approx(side.get_position().intervaly)
    for axes, texts in ((main, main.get_yticklabels()), (side, side.texts)):
        boxes = [text.get_window_extent(renderer) for text in texts if text.get_text()]
        ordered = sorted(boxes, key=lambda box: box.y0)
        assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(ordered)), axes.get_title()
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    bar_text = [text.get_window_extent(renderer) for text in side.texts]
    assert all(box.x1 <= side.get_window_extent(renderer).x1 + 1 for box in bar_text)


def test_deep_models_and_single_cells_are_drawn_legibly(tmp_path, monkeypatch):
    deep = {
        (layer, kind): Share(10, 10.0 ** (-layer % 7), 0)
        for layer in range(96)
        for kind in ("q", "k", "v", "o", "mlp up", "mlp down", "norm")
    }
    with monkeypatch.context() as patch:
        picture, figure = drawn(patch, FisherSummary(deep), tmp_path / "deep.png")
        nothing_overlaps(figure)
        assert picture.shape[0] < 3500
        assert figure.axes[0].get_yticklabels()[0].get_fontsize() >= 5
    picture, figure = drawn(monkeypatch, FisherSummary({(0, "q lora_A"): Share(10, 1.0)}), tmp_path / "one.png")
    low, high = figure.axes[0].images[1].get_clim()
    assert high / low == pytest.approx(10)
    nothing_overlaps(figure)


def test_a_fisher_without_positive_values_is_drawn_without_a_scale(tmp_path, monkeypatch):
    fisher = fisher_of(tiny_model(), scale=0.0)
    summary = summarise(fisher)
    _, figure = drawn(monkeypatch, summary, tmp_path / "zero.png")
    assert len(figure.axes) == 2
    assert "grey: F = 0" in figure.get_supxlabel()
    assert "-" in printed(summary)
    summarise({"a.weight": torch.full((3,), math.nan)}).plot(tmp_path / "nan.png")
    with pytest.raises(ValueError, match=r"path: expected a file ending in \.png, got .*f\.pdf; rename it"):
        summary.plot(tmp_path / "f.pdf")
