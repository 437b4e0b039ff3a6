"""vLLM itself, on the CPU: mmflex answers as plain vLLM does, and sparse as a patched transformers model does.

Run in a virtual environment of its own (`.ci/vllm`), since vLLM's wheel for CPUs pins its own PyTorch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("vllm.v1")  # the folder of these tests is no package of that name

import serving
from serving import accelerated, answers, engine, ids

import mmflex
from mask_builders import AShape, Dense, Grid, QBoundary, VerticalSlash
from mmflex.integrations.vllm import options

DENSE = options(Dense(), threshold=200, backend="dense")
"""Every request with 200 new tokens runs through mmflex, and computes what dense attention does."""

CHUNKS: dict[str, Any] = {"max_num_batched_tokens": 512, "enable_prefix_caching": True, "block_size": 32}


def close(found: list[Any], wanted: list[Any], tolerance: float = 1e-3) -> None:
    """The same tokens, with the same logprobs to ``tolerance``."""
    for (tokens, lines), (other, others) in zip(found, wanted, strict=True):
        assert tokens == other
        assert lines == pytest.approx(others, abs=tolerance)


def whole(llm: Any) -> list[Any]:
    """One long prompt; then five at once, two of them short."""
    return answers(llm, [ids(2000)]) + answers(llm, [ids(n, n) for n in (1500, 37, 700, 3, 400)])


def chunked(llm: Any) -> list[Any]:
    """In chunks of 512 beside a request that decodes; again with 1,500 tokens of the same prefix; and two at once."""
    beside = answers(llm, [ids(37, 1), ids(2000)], tokens=8)
    hit = answers(llm, [ids(1500) + ids(600, 2)])
    return beside + hit + answers(llm, [ids(900, 3), ids(1100, 4)])


@pytest.fixture(scope="module")
def plain() -> dict[str, list[Any]]:
    """What vLLM answers by itself."""
    out = {}
    with engine(serving.text_model()) as llm:
        out["whole"] = whole(llm)
    with engine(serving.text_model(), **CHUNKS) as llm:
        out["chunked"] = chunked(llm)
    return out


def test_whole_prompts_and_mixed_batches(plain: dict[str, list[Any]]) -> None:
    with engine(serving.text_model(), DENSE) as llm:
        close(whole(llm), plain["whole"])
        counters = accelerated().counters
        assert (counters.prefills, counters.tokens, counters.layers) == (4, 4600, 8)


def test_chunks_prefix_hits_and_decoding_rows(plain: dict[str, list[Any]]) -> None:
    with engine(serving.text_model(), DENSE, **CHUNKS) as llm:
        close(chunked(llm), plain["chunked"])
        # 475 + 3 x 511 (one token decodes) leaves fewer than 200; 608 behind the prefix: 512; then 512, 388 + 124, ...
        assert accelerated().counters.prefills >= 8


@pytest.mark.parametrize("value", [{}, {"mmflex": "off"}])
def test_off_is_vllm_as_it_was(plain: dict[str, list[Any]], value: dict[str, Any]) -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

    with engine(serving.text_model(), value) as llm:
        close(answers(llm, [ids(2000)]), plain["whole"][:1], 0.0)
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        assert all(layer.impl.mmflex is None and isinstance(layer.impl, CPUAttentionBackendImpl) for layer in layers)


def test_preempted_requests(plain: dict[str, list[Any]]) -> None:
    """Two requests for whose answers there is not room enough: one is computed again, its answer included."""
    given = {"num_gpu_blocks_override": 70, "block_size": 32, "max_model_len": 2048, "max_num_batched_tokens": 2048}
    prompts = [ids(1000, 5), ids(1000, 6)]
    with engine(serving.text_model(), **given) as llm:
        wanted = answers(llm, prompts, tokens=150)
    with engine(serving.text_model(), DENSE, **given) as llm:
        close(answers(llm, prompts, tokens=150), wanted)
        assert accelerated().counters.prefills == 3


def patched_logprobs(model: Any, spec: Any, prompt: list[int], chunk: int) -> torch.Tensor:
    """Logprobs of the next token by a patched transformers model, in chunks."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad(), mmflex.patched(model, spec, backend="reference"):
        for first in range(0, len(prompt), chunk):
            part = torch.tensor([prompt[first : first + chunk]])
            logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    return logits[0, -1].log_softmax(-1)


SPEC = {0: [VerticalSlash(40, 128), AShape(16, 128), Dense(), VerticalSlash(64, 256)], 1: VerticalSlash(40, 128)}


def test_sparse_is_the_patched_model() -> None:
    """The same weights and spec in transformers and in vLLM, whole and in chunks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(serving.text_model()).eval()
    prompt = ids(1536, 7)
    config = options(SPEC, threshold=200, backend="reference")
    dense = patched_logprobs(model, {}, prompt, 4096).max(-1)
    for chunk in (2048, 512):
        wanted = patched_logprobs(model, SPEC, prompt, chunk).max(-1)
        assert abs(float(wanted.values - dense.values)) > 0.01 or wanted.indices != dense.indices  # sparse tells
        with engine(serving.text_model(), config, max_num_batched_tokens=chunk) as llm:
            close(answers(llm, [prompt], tokens=1), [([int(wanted.indices)], [float(wanted.values)])])


def test_settings_that_make_no_sense_stop_the_engine() -> None:
    for config, text in (
        (options([AShape()] * 3), "3 patterns for 4 query heads"),
        (options({7: AShape()}), "layer 7"),
        ({"mmflex": {"spec": {"pattern": "Nothing"}}}, "unknown pattern 'Nothing'"),
    ):
        with pytest.raises(Exception, match=text), engine(serving.text_model(), config):
            pass


# ---- images and videos -----------------------------------------------------------------------------------------------


def test_layouts_of_served_videos() -> None:
    """The layout that patterns see is that of `mmflex.layout_for`; answers are plain vLLM's, whole and in chunks."""
    from PIL import Image
    from transformers import AutoConfig, AutoProcessor

    folder = serving.vision_model()
    film, facts = serving.film(12, 112, 112), {"fps": 2.0, "total_num_frames": 12, "frames_indices": list(range(12))}
    video, image = film, Image.fromarray(serving.film(1, 140, 84, 1)[0])
    text = (
        "Look: <|vision_start|><|video_pad|><|vision_end|> and <|vision_start|><|image_pad|><|vision_end|>" + "?" * 60
    )
    prompt = {
        "prompt": text,
        "multi_modal_data": {"video": [(video, {**facts, "do_sample_frames": False})], "image": [image]},
    }
    given: dict[str, Any] = {"skip_tokenizer_init": False, "enable_prefix_caching": True, "block_size": 32}
    inputs = AutoProcessor.from_pretrained(folder)(text=[text], videos=[video], images=[image], return_tensors="pt")
    layout = mmflex.layout_for(AutoConfig.from_pretrained(folder), inputs)
    with engine(folder, **given) as llm:
        wanted = answers(llm, [prompt])
    spec = QBoundary({"video": Grid("frame", local=64), "text": AShape(16, 64), "image": AShape(16, 64)})
    for budget in (4096, 128):
        with engine(
            folder, options(Dense(), threshold=100, backend="dense"), max_num_batched_tokens=budget, **given
        ) as llm:
            close(answers(llm, [prompt]), wanted)
            assert accelerated().counters.layers > 0
            assert layout.fingerprint in accelerated().layouts.kept or budget < layout.length
    with engine(folder, options(spec, threshold=50, backend="reference"), **given) as llm:
        first = answers(llm, [prompt])
        assert layout.fingerprint in accelerated().layouts.kept
        longer = {**prompt, "prompt": text + "!" * 80}  # all images are cached: vLLM does not send them again
        answers(llm, [longer])
        kept = list(accelerated().layouts.kept.values())[-1]
        assert (kept.modality[0] == 2).sum() == (layout.modality[0] == 2).sum()
        assert kept.frame_stride("video") == layout.frame_stride("video") == 16
        assert first != wanted
