"""The data of models, GPUs and tiers: names, files that change it, and whether the facts fit together."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvcm_ray.errors import InvalidArgument, NotFound
from kvcm_ray.optimizer import Catalogue, read_catalogue


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return read_catalogue()


#: Dense models: width of the feed-forward layers, tokens of the vocabulary, whether input and output share
#: one embedding, matrices of a feed-forward layer. Together with the shape they give the parameters.
DENSE = {
    "llama-2-7b": (11008, 32000, False), "llama-2-13b": (13824, 32000, False),
    "llama-2-70b": (28672, 32000, False), "llama-3-8b": (14336, 128256, False),
    "llama-3-70b": (28672, 128256, False), "llama-3-405b": (53248, 128256, False),
    "llama-3.2-1b": (8192, 128256, True), "llama-3.2-3b": (8192, 128256, True),
    "mistral-7b": (14336, 32768, False), "mistral-nemo-12b": (14336, 131072, False),
    "mistral-small-24b": (32768, 131072, False), "mistral-large-123b": (28672, 32768, False),
    "gemma-2b": (16384, 256000, True), "gemma-7b": (24576, 256000, True),
    "phi-4": (17920, 100352, False), "qwen2.5-0.5b": (4864, 151936, True),
    "qwen2.5-1.5b": (8960, 151936, True), "qwen2.5-3b": (11008, 151936, True),
    "qwen2.5-7b": (18944, 152064, False), "qwen2.5-14b": (13824, 152064, False),
    "qwen2.5-32b": (27648, 152064, False), "qwen2.5-72b": (29568, 152064, False),
    "qwen3-0.6b": (3072, 151936, True), "qwen3-1.7b": (6144, 151936, True),
    "qwen3-4b": (9728, 151936, True), "qwen3-8b": (12288, 151936, False),
    "qwen3-14b": (17408, 151936, False), "qwen3-32b": (25600, 151936, False),
    "smollm2-135m": (1536, 49152, True), "smollm2-360m": (2560, 49152, True),
    "smollm2-1.7b": (8192, 49152, True),
}  # fmt: skip

#: Mixtures of experts: width of an expert, experts, those that a token uses, vocabulary.
MIXED = {
    "mixtral-8x7b": (14336, 8, 2, 32000), "mixtral-8x22b": (16384, 8, 2, 32768),
    "qwen3-30b-a3b": (768, 128, 8, 151936), "qwen3-235b-a22b": (1536, 128, 8, 151936),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_parameters_fit_the_shape(catalogue: Catalogue, name: str) -> None:
    model, (feed_forward, vocabulary, tied) = catalogue.models[name], DENSE[name]
    attention = 2 * model.hidden_size * model.head_size * (model.heads + model.kv_heads)
    embedding = vocabulary * model.hidden_size * (1 if tied else 2)
    total = model.layers * (attention + 3 * model.hidden_size * feed_forward) + embedding
    assert model.parameters == pytest.approx(total, rel=0.005)
    assert not model.parameters_total


@pytest.mark.parametrize("name", MIXED)
def test_parameters_of_mixtures_fit_the_shape(catalogue: Catalogue, name: str) -> None:
    model, (width, experts, used, vocabulary) = catalogue.models[name], MIXED[name]
    rest = model.layers * 2 * model.hidden_size * model.head_size * (model.heads + model.kv_heads)
    rest += 2 * vocabulary * model.hidden_size
    expert = model.layers * 3 * model.hidden_size * width
    assert model.parameters == pytest.approx(rest + used * expert, rel=0.02)
    assert model.parameters_total == pytest.approx(rest + experts * expert, rel=0.01)


def test_every_model_is_checked_or_has_a_latent(catalogue: Catalogue) -> None:
    latent = {name for name, model in catalogue.models.items() if model.kv_latent}
    assert {*DENSE, *MIXED, *latent} == set(catalogue.models)
    for name in latent:
        model = catalogue.models[name]
        assert (model.head_size, model.value_head_size, model.kv_latent) == (128 + 64, 128, 512 + 64)
        assert 0 < model.parameters < model.parameters_total


def test_bytes_of_a_token(catalogue: Catalogue) -> None:
    """As others compute them too: 128 KiB for llama-3-8b, 320 KiB for 70b, 70 272 bytes for deepseek-v3."""
    assert catalogue.model("llama-3-8b").kv_bytes_per_token() == 128 * 1024
    assert catalogue.model("llama-3-70b").kv_bytes_per_token() == 320 * 1024
    assert catalogue.model("llama-3-70b").kv_bytes_per_token(1) == 160 * 1024
    assert catalogue.model("llama-2-7b").kv_bytes_per_token() == 512 * 1024
    assert catalogue.model("deepseek-v3").kv_bytes_per_token() == 61 * 576 * 2 == 70_272
    assert catalogue.model("smollm2-135m").kv_bytes_per_token() == 30 * 2 * 3 * 64 * 2
    assert catalogue.model("llama-3-70b").attention_width == 8192
    assert catalogue.model("deepseek-v3").attention_width == 128 * 160


def test_gpus_and_tiers_are_plausible(catalogue: Catalogue) -> None:
    for name, gpu in catalogue.gpus.items():
        assert name == gpu.name
        assert 5e13 < gpu.peak_flops < 3e15
        assert 100 < gpu.peak_flops / gpu.memory_bytes_per_s < 500, "operations a byte"
        assert 0.1 < gpu.usd_per_hour < 10
    assert (catalogue.gpu("h100").peak_flops, catalogue.gpu("h100").memory_bytes) == (989.5e12, 80e9)
    for name, tier in catalogue.tiers.items():
        assert name == tier.name
        assert 1e8 < tier.read_bytes_per_s < 1e11
        assert 0 < tier.latency_s < 1
        assert 0 < tier.usd_per_gib_month < 10
    prices = [catalogue.tier(name).usd_per_gib_month for name in ("dram", "nvme", "object-store")]
    assert prices == sorted(prices, reverse=True)


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("llama-3-70b", "llama-3-70b"),
        ("meta-llama/Llama-3.3-70B-Instruct", "llama-3-70b"),
        ("meta-llama/Meta-Llama-3-8B", "llama-3-8b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-v3"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2-135m"),
    ],
)
def test_names_as_they_are_published(catalogue: Catalogue, asked: str, name: str) -> None:
    assert catalogue.model(asked).name == name


def test_unknown_names_tell_what_is_near(catalogue: Catalogue) -> None:
    with pytest.raises(NotFound, match="'lama-3-70'; did you mean llama-3-70b") as error:
        catalogue.model("lama-3-70")
    assert "--catalogue" in error.value.remedy
    with pytest.raises(NotFound, match="no GPU 'h1000'; did you mean h100"):
        catalogue.gpu("h1000")
    with pytest.raises(NotFound, match="no tier 'floppy'; there are dram, remote-dram"):
        catalogue.tier("floppy")


def write(folder: Path, text: str) -> Path:
    file = folder / "ours.toml"
    file.write_text(text)
    return file


def test_a_file_adds_and_changes(tmp_path: Path, catalogue: Catalogue) -> None:
    ours = write(
        tmp_path,
        """
        [gpus.A100]
        usd_per_hour = 1.25
        [models."ours-1.5b"]
        aliases = ["us"]
        parameters = 1.5
        layers = 10
        heads = 4
        kv_heads = 2
        head_size = 64
        [tiers.tape]
        read_gb_per_s = 0.5
        """,
    )
    found = read_catalogue(ours)
    assert found.gpu("a100-80gb").usd_per_hour == 1.25, "an alias names the entry that it stands for"
    assert found.gpu("a100").peak_flops == catalogue.gpu("a100").peak_flops
    assert found.model("us").parameters == 1.5e9
    assert found.model("us").kv_bytes_per_token() == 2 * 10 * 2 * 64 * 2
    assert (found.tier("tape").read_bytes_per_s, found.tier("tape").usd_per_gib_month) == (5e8, 0)
    assert len(found.gpus) == len(catalogue.gpus)
    assert read_catalogue().gpu("a100").usd_per_hour == catalogue.gpu("a100").usd_per_hour, "nothing sticks"


SHAPE = "parameters = 1\nlayers = 1\nheads = 1\nkv_heads = 1\nhead_size = 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gpus.h100", "not TOML"),
        ("[cards.h100]\nx = 1", "models, gpus, tiers, not 'cards'"),
        ("gpus = 3", "begin each with [gpus.NAME]"),
        ("[gpus]\nh100 = 3", "begin each with [gpus.NAME]"),
        ("[models.qwen3-1.7b]\n" + SHAPE, 'quote a name with a dot: [models."qwen3-1.7b"]'),
        ("[gpus.h100]\nusd_per_hr = 1", "gpus.h100: no such field 'usd_per_hr'; did you mean 'usd_per_hour'"),
        ("[gpus.mine]\nteraflops = 1", "gpus.mine: memory_gb is missing"),
        ("[gpus.h100]\nteraflops = 'many'", "teraflops must be a number, not 'many'"),
        ("[gpus.h100]\nteraflops = 0", "GPU 'h100': peak_flops must be above 0"),
        ("[gpus.h100]\nusd_per_hour = -1", "usd_per_hour must not be negative"),
        ("[tiers.dram]\nlatency_s = nan", "latency_s must not be negative"),
        ("[models.m]\n" + SHAPE.replace("layers = 1", "layers = 1.5"), "layers must be a whole number"),
        ("[models.m]\naliases = 'us'\n" + SHAPE, "aliases must be a list of names"),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        read_catalogue(write(tmp_path, text))
    assert message in error.value.message


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"cannot read the catalogue .*nowhere\.toml"):
        read_catalogue(tmp_path / "nowhere.toml")
