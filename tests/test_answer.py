"""`mmflex run`: a tiny Qwen2.5-VL answers about a video that is written here, dense beside sparse."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, IMAGE, START, VIDEO
from typer.testing import CliRunner

transformers = pytest.importorskip("transformers")

from mask_builders import AShape, Dense  # noqa: E402
from mmflex.cli import answer, app, estimate, models, prompts  # noqa: E402
from mmflex.cli.options import counted, in_short  # noqa: E402
from mmflex.cli.prompts import shortened  # noqa: E402
from mmflex.demo import moving_shapes  # noqa: E402
from mmflex.evaluation.beside import Beside, Side, beside  # noqa: E402
from mmflex.integrations import frames as module  # noqa: E402
from mmflex.integrations.frames import read_frames, spread  # noqa: E402
from mmflex.integrations.notice import mostly, predicted_dense  # noqa: E402
from mmflex.integrations.shape import head_dim_of, sees_all  # noqa: E402

WORDS = {"<pad>": 0, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO, "<|vision_start|>": START}
WORDS |= {f"w{i}": i for i in range(1, 128) if i not in WORDS.values()}
TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'video' %}<|vision_start|><|video_pad|>"
)
TEMPLATE += "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
AS_FILE = '{"pattern": "AShape", "version": 1, "sink": 128, "local": 128}'


def output_of(*arguments: str, code: int = 0) -> str:
    environment = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}
    result = CliRunner(env=environment).invoke(app, ["run", *arguments])
    assert result.exit_code == code, result.output
    return re.sub(r"\x1b\[[0-9;]*m", "", result.output)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel

    words = Tokenizer(WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>")
    made.add_special_tokens({"additional_special_tokens": [w for w in WORDS if w.startswith("<|")]})
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2.5-VL with its tokenizer, as a download has them."""
    path = tmp_path_factory.mktemp("model")
    model = FAMILIES["qwen2_5_vl"].model()
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seconds of moving shapes, 20 frames of 64 x 48 pixels, each a little brighter at the top left corner."""
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("film") / "film.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "bgr0"
        for number, picture in enumerate(moving_shapes(20, 64)[:, :48]):
            picture[:8, :8] = 10 * number
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


# ---- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "expected"), [(None, [5, 15]), (4, [2, 7, 12, 17]), (99, list(range(20)))])
def test_frames_are_spread_evenly(film: Path, count: int | None, expected: list[int]) -> None:
    found = read_frames(film, count)
    assert found.indices == expected
    assert (found.total, found.fps, found.reader) == (20, 10.0, "pyav")
    assert found.pixels.shape == (len(expected), 48, 64, 3)
    assert found.pixels[:, 4, 4, 0].tolist() == [10 * i for i in expected]
    assert found.metadata["duration"] == 2.0


def test_long_videos_are_not_read_whole() -> None:
    assert len(spread(100_000, 25.0, None)) == module.MOST
    assert spread(3, 25.0, None) == [1]


def test_torchcodec_reads_the_same_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class VideoDecoder:
        metadata = SimpleNamespace(num_frames=50, average_fps=25.0)

        def __init__(self, path: str, dimension_order: str) -> None:
            assert dimension_order == "NHWC"

        def get_frames_at(self, indices: list[int]) -> Any:
            return SimpleNamespace(
                data=torch.tensor(indices, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 4, 3)
            )

    package, decoders = ModuleType("torchcodec"), ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = VideoDecoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name == "torchcodec" or None)
    (tmp_path / "x.mp4").write_bytes(b"video")
    found = read_frames(tmp_path / "x.mp4", 5)
    assert found.indices == found.pixels[:, 0, 0, 0].tolist() == [5, 15, 25, 35, 45]
    assert found.reader == "torchcodec"
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="needs PyAV or torchcodec: pip install"):
        read_frames(tmp_path / "x.mp4")


def test_files_that_are_no_videos(tmp_path: Path) -> None:
    pytest.importorskip("av")
    with pytest.raises(ValueError, match="there is no file"):
        read_frames(tmp_path / "none.mp4")
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match="is not a video that PyAV can read"):
        read_frames(tmp_path / "text.mp4")
    with pytest.raises(ValueError, match="0 frames were asked for"):
        read_frames(tmp_path / "text.mp4", 0)


# ---- both sides ------------------------------------------------------------------------------------------------------


def test_dense_beside_dense_is_the_same_answer() -> None:
    family = FAMILIES["qwen2_5_vl"]
    model = family.model()
    inputs = family.batch(model.config, batch=1).inputs
    found = beside(model, inputs, Dense(), str, new_tokens=5, runs=1, backend="reference")
    assert found.dense.tokens == found.sparse.tokens
    assert found.same == len(found.dense.tokens) == 5
    assert found.densities == [1.0, 1.0]
    assert set(found.dense.seconds) == {"vision tower", "language model", "first token"}
    assert found.dense.first_token_s == pytest.approx(sum(found.dense.runs[0].values()))
    assert "_mmflex_patch" not in vars(model)
    with pytest.raises(ValueError, match="got 2, 5, 1"):
        beside(model, family.batch(model.config, batch=2).inputs, Dense(), str, new_tokens=5, runs=1)


def test_what_answers_share() -> None:
    def side(*tokens: int) -> Side:
        return Side("", list(tokens), 1.0, [{"language model": 1.0}, {"language model": 3.0, "first token": 1.0}])

    found = Beside(10, "text 10", side(1, 2, 3), side(1, 2, 4, 5), [0.5])
    assert found.same == 2
    assert Beside(10, "", side(1, 2), side(1, 2, 3), []).same == 2
    assert found.dense.first_token_s == 2.5
    assert found.dense.seconds == {"language model": 2.0, "first token": 0.5}
    json.dumps(found.to_json())


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A processor that needs no torchvision: it records what it is given, and returns a fixed prompt."""
    given: list[Any] = []

    def prepare(model: str, text: str, taken: Any) -> Any:
        given.append((text, taken))
        family = FAMILIES["qwen2_5_vl"]
        return family.batch(family.model().config, text=1500).inputs, lambda ids: " ".join(f"w{i}" for i in ids)

    monkeypatch.setattr(answer, "prepare", prepare)
    monkeypatch.setattr(answer, "check_media", lambda *args: None)
    return given


def test_a_video(folder: Path, film: Path, prepared: list[Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "spec.json").write_text(AS_FILE)
    picture, written = tmp_path / "masks.png", tmp_path / "run.json"
    options = ("--frames", "6", "--tokens", "3", "--runs", "1", "--device", "cpu", "--backend", "reference")
    text = output_of(
        str(folder), "--video", str(film), "--prompt", "w1 w2", "--spec", str(tmp_path / "spec.json"), *options,
        "-o", str(picture), "--json", str(written),
    )  # fmt: skip
    asked, taken = prepared[0]
    assert (asked, len(taken.indices)) == ("w1 w2", 6)
    for line in (
        "6 of 20 frames of 64 x 48 pixels",
        "vision tower",
        "language model",
        "of the causal pairs",
        "agree in",
    ):
        assert line in text
    assert "timing the prefill, sparse, 1 of 1" in text  # plain lines, as this is no terminal
    assert picture.stat().st_size > 5000
    data = json.loads(written.read_text())
    assert len(data["dense"]["tokens"]) == 3
    assert len(data["densities"]) == 2
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    inputs = answer.prepare("", "", None)[0]
    expected = beside(model, inputs, AShape(128, 128), str, new_tokens=3, runs=1, backend="reference")
    assert data["sparse"]["tokens"] == expected.sparse.tokens


def test_a_dry_run_loads_nothing(
    folder: Path, film: Path, prepared: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answer, "load", lambda *args: pytest.fail("weights were loaded"))
    text = output_of(str(folder), "--video", str(film), "--prompt", "w1", "--device", "cpu", "--dry-run", "--runs", "3")
    model = FAMILIES["qwen2_5_vl"].model()
    size = sum(p.numel() for p in model.parameters())
    assert 10_000 < size < 999_500
    assert f"{size / 1e3:.{0 if size > 99_950 else 1}f}k parameters, 2 layers x 4 heads" in text
    assert "8 prefills and two answers of 64 tokens" in text
    assert "BlockPeaks" in text


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose chat template puts the mark of a beginning in front, and whose tokenizer does the same."""
    from tokenizers.processors import TemplateProcessing

    path = tmp_path_factory.mktemp("text")
    FAMILIES["llama3"].model().save_pretrained(path)
    made = tokenizer()
    made.bos_token = "w1"
    made.backend_tokenizer.post_processor = TemplateProcessing(single="w1 $A", special_tokens=[("w1", 1)])
    made.chat_template = "{{ bos_token }} w2 {% for m in messages %}{{ m['content'] }}{% endfor %} w3"
    made.save_pretrained(path)
    return path


def test_a_template_is_tokenised_without_a_second_beginning(text_folder: Path) -> None:
    inputs, decode = answer.prepare(str(text_folder), "w7 w8")
    assert inputs["input_ids"].tolist() == [[1, 2, 7, 8, 3]]
    assert decode([7, 8]) == "w7 w8"
    plain, _ = answer.prepare(str(text_folder), "w7 w8", template=False)
    assert plain["input_ids"].tolist() == [[1, 7, 8]]


@pytest.mark.parametrize("begin", ["<s>", None])
def test_images_and_frames_stand_before_the_text(begin: str | None, tmp_path: Path, monkeypatch: Any) -> None:
    """As a processor is given them, which adds special tokens unless it is told that the template wrote them."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (6, 4)).save(tmp_path / "a.png")
    given: dict[str, Any] = {}

    class Processor:
        tokenizer = SimpleNamespace(bos_token=begin)

        def apply_chat_template(self, messages: Any, **options: Any) -> str:
            return f"<s>{[part['type'] for part in messages[0]['content']]}"

        def __call__(self, **options: Any) -> dict[str, Any]:
            given.update(options)
            return {}

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda name: Processor())
    monkeypatch.setattr(prompts.importlib.util, "find_spec", lambda name: object())
    frames = module.Frames(np.zeros((2, 4, 4, 3), np.uint8), [1, 3], 5, 2.0, "pyav")
    answer.prepare("a/model", "why", frames, [tmp_path / "a.png"])
    assert given["text"] == ["<s>['image', 'video', 'text']"]
    assert given["images"][0][0].size == (6, 4)
    assert given["video_metadata"][0]["frames_indices"] == [1, 3]
    assert given.get("add_special_tokens") is (False if begin else None)


@pytest.mark.parametrize(("tokens", "expected"), [(5, [0, 1, 2, 7, 8]), (4, [0, 1, 7, 8]), (1, [0]), (9, range(9))])
def test_prompts_are_cut_out_of_their_middle(tokens: int, expected: Any) -> None:
    inputs = {"input_ids": torch.arange(9)[None], "attention_mask": torch.ones(1, 9)}
    found = shortened(inputs, tokens)
    assert found["input_ids"].tolist() == [list(expected)]
    assert found["attention_mask"].shape == (1, len(list(expected)))


def test_a_dry_run_of_text(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answer, "load", lambda *args: pytest.fail("weights were loaded"))
    monkeypatch.setattr(estimate, "product_rate", lambda *args: 1e6)
    (tmp_path / "long.txt").write_text(" ".join(f"w{20 + i % 70}" for i in range(500)))
    common = (str(text_folder), "--prompt", f"@{tmp_path / 'long.txt'}", "--device", "cpu", "--dry-run")
    text = output_of(*common, "--spec", AS_FILE, "--json", str(tmp_path / "run.json"))
    assert "prompt: 503 tokens" in text
    assert re.search(r"backend auto: 2 of 2 layers will run dense, .* \(layer 0: predicted [\d.]+ ms, any spec", text)
    assert "name a backend" in text
    model = FAMILIES["llama3"].model()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    every = sum(p.numel() for p in model.parameters())
    body = every - embedding.numel() - (0 if head is embedding else head.numel())
    seconds = 2e-6 * (503 * body + head.numel())  # attention takes next to nothing by the cost model
    found = re.search(r"about ([\d.]+) s a dense prefill", text)
    assert found is not None
    assert float(found[1]) == pytest.approx(seconds, rel=0.1)
    assert f"would write: {tmp_path / 'run.json'}" in text
    assert not (tmp_path / "run.json").exists()
    assert "backend auto" not in output_of(*common, "--spec", AS_FILE, "--backend", "cpu")
    (tmp_path / "config.json").write_text("{}")
    assert "schema" in output_of(*common, "--spec", str(tmp_path / "config.json"), code=1)


def test_layers_that_auto_will_run_dense_are_those_that_it_does() -> None:
    """The prediction without a model against what the notice has seen of a patched one."""
    import mmflex

    model = FAMILIES["llama3"].model()
    ids = torch.arange(700)[None] % 90 + 1
    spec = {0: (AShape(128, 128),) * 4, 1: (Dense(),) * 4}
    found = predicted_dense(model.config, spec, mmflex.TokenLayout.text(700), "cpu", model.dtype)
    with torch.no_grad(), mmflex.patched(model, spec):
        model(input_ids=ids)
        seen = vars(model)["_mmflex_patch"].mostly_dense.reasons
    assert found == seen
    assert found[0].startswith("predicted")
    assert found[1] == ""
    assert not mostly(found, 2)
    assert mostly(found, 1)


def test_widths_and_layers_of_configs() -> None:
    config = SimpleNamespace
    assert head_dim_of(config(hidden_size=96, num_attention_heads=4)) == 24
    assert head_dim_of(config(hidden_size=96, num_attention_heads=4, head_dim=32)) == 32
    latent = transformers.DeepseekV3Config(qk_nope_head_dim=48, qk_rope_head_dim=16)
    assert head_dim_of(latent) == 64
    assert head_dim_of(config(hidden_size=96)) is None
    assert sees_all(config(), 0, 10**6)
    assert not sees_all(config(sliding_window=512), 0, 513)
    assert sees_all(config(sliding_window=512), 0, 512)
    kinds = ["full_attention", "sliding_attention", "linear_attention", "chunked_attention"]
    mixed = config(sliding_window=512, layer_types=kinds)
    assert [sees_all(mixed, i, 513) for i in range(4)] == [True, False, False, False]
    assert [sees_all(mixed, i, 100) for i in range(4)] == [True, True, False, False]
    assert not sees_all(config(attention_chunk_size=8192), 0, 100)


def test_text_alone(tmp_path: Path) -> None:
    family = FAMILIES["llama3"]
    model = family.model()
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "long.txt").write_text(" ".join(f"w{5 + i % 80}" for i in range(300)))
    text = output_of(
        str(tmp_path / "model"), "--prompt", f"@{tmp_path / 'long.txt'}", "--tokens", "2", "--runs", "1",
        "--device", "cpu", "--spec", AS_FILE, "--backend", "reference",
    )  # fmt: skip
    assert "300 tokens: text 300" in text
    assert "vision tower" not in text
    assert re.search(r"\nw\d+ w\d+\n", text)
    assert "every causal pair was computed" in output_of(
        str(tmp_path / "model"), "--prompt", "w7 w8", "--tokens", "1", "--runs", "1", "--device", "cpu"
    )


def test_the_real_processor(folder: Path, film: Path) -> None:
    """Frames, their times and the prompt, as transformers' video processor takes them."""
    pytest.importorskip("torchvision")
    config = transformers.AutoConfig.from_pretrained(folder)
    sizes = {"patch_size": config.vision_config.patch_size, "merge_size": config.vision_config.spatial_merge_size}
    sizes |= {"temporal_patch_size": config.vision_config.temporal_patch_size}
    limits = {"shortest_edge": 1, "longest_edge": 1 << 20}
    transformers.Qwen2_5_VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(size=limits, **sizes),
        tokenizer=tokenizer(),
        video_processor=transformers.Qwen2VLVideoProcessor(size=limits, **sizes),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    inputs, decode = answer.prepare(str(folder), " w1 w2 w3", read_frames(film, 6))
    cells = int(inputs["video_grid_thw"].prod()) // sizes["merge_size"] ** 2
    assert int(inputs["video_grid_thw"][0, 0]) == 6 // sizes["temporal_patch_size"]
    assert int((inputs["input_ids"] == VIDEO).sum()) == cells > 0
    assert decode([1, 2]) == "w1 w2"
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(sizes["temporal_patch_size"] / 3)  # 6 frames in 2 s
    options = ("--tokens", "2", "--runs", "1", "--device", "cpu", "--frames", "6")
    text = output_of(str(folder), "--video", str(film), "--prompt", " w1", *options, "--spec", AS_FILE)
    assert f"{cells + 2} tokens" in text


def test_errors_name_the_option_and_the_way_out(folder: Path, film: Path, tmp_path: Path) -> None:
    assert "there is no file none.mp4" in output_of(str(folder), "--video", "none.mp4", "--prompt", "w1", code=1)
    assert "is not JSON" in output_of(str(folder), "--prompt", "w1", "--spec", "{x}", code=1)
    assert "no folder" in output_of(str(folder), "--prompt", "w1", "--json", str(tmp_path / "a" / "b"), code=1)
    assert "--prompt" in output_of(str(folder), code=2)


@pytest.fixture
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prepare", "load"):
        monkeypatch.setattr(answer, name, lambda *args: pytest.fail("it went on"))
    monkeypatch.setattr(module, "read_frames", lambda *args: pytest.fail("the film was read"))


def only_error(*arguments: str) -> str:
    text = output_of(*arguments, code=1)
    assert text.startswith("error: "), text
    assert text.count("\n") == 1, text
    return text


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--device", "cuda"], ["--device is 'cuda'", "sees none", "--device cpu, or auto"]),
        (["--device", "cuda:3"], ["--device is 'cuda:3'", "sees none", "--device cpu, or auto"]),
        (["--device", "gpu"], ["--device is 'gpu'", "give cpu, cuda"]),
        (["--dtype", "int8"], ["--dtype is 'int8'", "bfloat16 (bf16)", "auto (as stored)"]),
        (["--backend", "refrence"], ["--backend is 'refrence'", "give auto, flash", "did you mean reference?"]),
        (["--backend", "triton"], ["--backend is 'triton'", "on cpu", "give --backend cpu, dense or reference"]),
        (["--prompt", "@none.txt"], ["--prompt is '@none.txt'", "there is no file none.txt"]),
    ],
)
def test_options_are_checked_first(
    options: list[str], parts: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    text = only_error(str(folder), "--prompt", "w1", *options)
    assert all(part in text for part in parts), text


@pytest.mark.usefixtures("nothing_slow")
def test_models_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("./nowhere", "/no/where", "..", str(tmp_path), "a/b/c"):
        text = only_error(name, "--prompt", "w1")
        assert "holds no model" in text if Path(name).is_dir() else f"there is no folder {name}: give one" in text
    (tmp_path / "model.bin").touch()
    assert "is a file: give the folder" in only_error(str(tmp_path / "model.bin"), "--prompt", "w1")
    (tmp_path / "model.gguf").touch()
    for name in (str(tmp_path / "model.gguf"), str(tmp_path)):  # the file, and the folder that holds it
        text = only_error(name, "--prompt", "w1")
        assert f"{tmp_path / 'model.gguf'} is a GGUF file, which mmflex eval --model reads as it is" in text
        assert f"real.load('{tmp_path / 'model.gguf'}').save('model')" in text

    def offline(*args: Any, **options: Any) -> Any:
        raise OSError("We couldn't connect to the Hub.\nCheck your internet connection")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", offline)
    text = only_error("some/model", "--prompt", "w1")
    assert "'some/model' is no folder here, and transformers finds no model of that name: We couldn't connect" in text


@pytest.mark.usefixtures("nothing_slow")
def test_videos_are_checked_before_they_are_read(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "film.mp4").touch()
    FAMILIES["llama3"].model().save_pretrained(tmp_path / "text")
    video = ("--video", str(tmp_path / "film.mp4"), "--prompt", "w1")
    assert "--video is given, and" in only_error(str(tmp_path / "text"), *video)
    assert "(llama) is a model of text alone: leave --video out" in only_error(str(tmp_path / "text"), *video)
    for missing, said in (("torchvision", "torchvision,"), ("av torchcodec", "PyAV or torchcodec,")):
        with monkeypatch.context() as patch:
            find = models.importlib.util.find_spec
            lacks = missing.split()
            patch.setattr(
                models.importlib.util, "find_spec",
                lambda name, *more, find=find, lacks=lacks: None if name in lacks
                else object() if name in ("torchvision", "av", "torchcodec") else find(name, *more),
            )  # fmt: skip
            text = only_error(str(folder), *video)
        assert f"--video needs {said} not installed here: pip install 'mmflex[video]'" in text


def test_names_of_dtypes_and_numbers() -> None:
    assert [models.dtype_of(name) for name in ("bf16", "fp16", "fp32")] == ["bfloat16", "float16", "float32"]
    assert models.dtype_of("auto", auto=True) == "auto"
    with pytest.raises(ValueError, match="--dtype is 'auto': give bfloat16"):
        models.dtype_of("auto")
    numbers = {1: "1", 999: "999", 12_345: "12.3k", 999_700: "1.00M", 134_500_000: "134M", 7_620_000_000: "7.62B"}
    assert {n: in_short(n) for n in numbers} == numbers
    assert (counted(1, "head"), counted(1000, "head")) == ("1 head", "1,000 heads")
