"""The evaluation's prompts, its models, and the script that trains them."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import mmflex
from mmflex.evaluation import models, samples, texts, videos
from mmflex.evaluation import vocabulary as ids
from mmflex.evaluation.pixels import glyphs

pytest.importorskip("transformers")
VISION = [("v-niah", 256), ("v-niah", 1024), ("mm-niah", 512), ("mm-niah", 2048)]


@pytest.fixture
def training(monkeypatch):
    """The training script's modules."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import recipes, text_recipe, train

    return SimpleNamespace(recipes=recipes, text_recipe=text_recipe, train=train)


@pytest.mark.parametrize(("task", "tokens"), VISION)
def test_a_seed_determines_the_prompts(task, tokens):
    first, again, other = (samples.prompts(task, tokens, batch=2, questions=4, seed=seed) for seed in (5, 5, 6))
    assert set(first.inputs) == set(again.inputs)
    assert all(torch.equal(first.inputs[name], again.inputs[name]) for name in first.inputs)
    assert torch.equal(first.answers, again.answers)
    assert torch.equal(first.depths, again.depths)
    assert first.inputs["pixel_values_videos"].shape != other.inputs["pixel_values_videos"].shape or not torch.equal(
        first.inputs["pixel_values_videos"], other.inputs["pixel_values_videos"]
    )
    assert first.inputs["input_ids"].shape == (2, tokens)
    assert not torch.equal(first.answers[0], first.answers[1])


def test_training_never_draws_from_a_seed_of_the_evaluation():
    seeds = range(0, 2000, 7)
    evaluation = {samples.evaluation_generator(seed).initial_seed() for seed in seeds}
    training = {samples.training_generator(seed).initial_seed() for seed in range(2000)}
    assert len(evaluation) == len(seeds)
    assert not evaluation & training
    assert max(evaluation | training) < 2**31  # torch's CPU generator looks at 32 bits of a seed
    with pytest.raises(ValueError, match=str(2**30)):
        samples.prompts("v-niah", 256, batch=1, questions=2, seed=2**30)


def shown_glyphs(prompts, number):
    """An independent reader: per video, the glyphs in its tiles as {(frame, row, column): glyph}, from pixels alone."""
    grid = prompts.inputs["video_grid_thw"]
    per_prompt = len(grid) // len(prompts.answers)
    sizes = grid.prod(-1).tolist()
    patches = prompts.inputs["pixel_values_videos"].split(sizes)
    table = glyphs().view(128, 2, 2, 3, 4, 4)
    found = []
    for video in range(number * per_prompt, (number + 1) * per_prompt):
        frames, height, width = grid[video].tolist()
        tiles = patches[video].view(frames, height // 2, width // 2, 2, 2, 3, 4, 4)
        at = {}
        for place in torch.cartesian_prod(*(torch.arange(n) for n in tiles.shape[:3])).tolist():
            apart = (tiles[tuple(place)] - table).abs().mean(dim=(1, 2, 3, 4, 5))
            if apart.min() < 0.2:
                at[tuple(place)] = int(apart.argmin())
        found.append(at)
    return found


@pytest.mark.parametrize(("task", "tokens"), VISION[:3])
def test_the_answers_can_be_read_from_the_prompt(task, tokens):
    prompts = samples.prompts(task, tokens, batch=2, questions=6, seed=3)
    for number, tokens_of in enumerate(prompts.inputs["input_ids"].tolist()):
        videos_of, text = shown_glyphs(prompts, number), tokens_of
        for j, kind in enumerate(prompts.kinds[number]):
            row = int(prompts.rows[number, j])
            assert text[row - 1] == ids.QUESTION
            key, answers = text[row], set()
            if kind == "text":
                answers = {text[i + 2] for i in range(len(text) - 2) if text[i] == ids.FACT and text[i + 1] == key}
            for at in videos_of if kind != "text" else []:
                for (frame, *cell), glyph in at.items():
                    later = sorted((f, g) for (f, *c), g in at.items() if c == cell and f > frame)
                    if glyph == key - ids.KEYS and later and later[0][1] >= 64:
                        answers.add(ids.VALUES + later[0][1] - 64)
                        assert (later[0][0] - frame == 1) == (kind == "near")
            assert answers == {int(prompts.answers[number, j])}


@pytest.mark.parametrize("version_of", ["v-niah", "mm-niah"])
def test_distractors_are_there(version_of):
    prompts = samples.prompts(version_of, 1024, batch=1, questions=6, seed=1)
    names = [glyph for at in shown_glyphs(prompts, 0) for glyph in at.values()]
    asked = [int(prompts.inputs["input_ids"][0, row]) - ids.KEYS for row in prompts.rows[0]]
    assert len(names) > 30
    assert any(names.count(key) > 1 for key in asked)


@pytest.mark.parametrize("task", samples.VISION)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needles_are_where_they_are_asked_for(task, depth):
    prompts = samples.prompts(task, 4096, batch=2, questions=6, seed=2, depth=depth)
    near = torch.tensor([[kind == "near" for kind in kinds] for kinds in prompts.kinds])
    assert (prompts.depths[near] - depth).abs().max() < (0.05 if task == "v-niah" else 0.2)
    assert prompts.depths.min() >= 0
    assert prompts.depths.max() <= 1


@pytest.mark.parametrize(("task", "tokens"), VISION)
def test_the_layout_is_that_of_the_prompt(task, tokens):
    model = models.build("vision", hidden=64, layers=1).eval()
    prompts = samples.prompts(task, tokens, batch=2, questions=4, seed=11)
    layout = mmflex.layout_for(model.config, prompts.inputs)
    is_video = prompts.inputs["input_ids"] == ids.VIDEO
    grid = prompts.inputs["video_grid_thw"]
    assert torch.equal(torch.from_numpy(layout.cell >= 0), is_video)
    cells = int(grid[0, 1] * grid[0, 2]) // 4
    assert int(layout.cell.max()) == cells - 1
    share = 1 - is_video.float().mean()
    assert share < 0.35 if task == "mm-niah" else share < 0.3


def test_positions_are_the_models_own():
    model = models.build("vision", hidden=64, layers=1)
    cut = videos.cut("mm-niah", 2048, 6, random.Random(0))
    assert len(cut.runs) > 1
    inputs = videos.processed(videos.draw(cut, 1, samples.training_generator(0)))
    inputs.pop("pixel_values_videos")
    positions, _ = model.model.get_rope_index(**inputs)
    assert torch.equal(positions[:, 0], videos.tables(cut).positions)


TEXT = [("retrieval", 256), ("retrieval", 1024), ("tracking", 256), ("tracking", 2048)]


def assigned(tokens):
    """An independent reader of text: what each name is set to, line by line, and the lines' places by name."""
    state, lines = {}, {}
    for i, token in enumerate(tokens[:-2]):
        if token in (ids.FACT, ids.SET, ids.COPY):
            name, source = tokens[i + 1], tokens[i + 2]
            assert name not in state
            state[name] = (0, source) if token != ids.COPY else (1 + state[source][0], state[source][1])
            lines[name] = (i, token, source)
    return state, lines


@pytest.mark.parametrize(("task", "tokens"), TEXT)
@pytest.mark.parametrize("depth", [None, 0.75])
def test_the_answers_can_be_read_from_the_text(task, tokens, depth):
    prompts = samples.prompts(task, tokens, batch=3, questions=6, seed=3, depth=depth)
    assert prompts.inputs["input_ids"].shape == prompts.inputs["attention_mask"].shape == (3, tokens)
    for number, text in enumerate(prompts.inputs["input_ids"].tolist()):
        state, lines = assigned(text)
        assert len({value for hops, value in state.values() if not hops}) == sum(not h for h, _ in state.values())
        for j, kind in enumerate(prompts.kinds[number]):
            row = int(prompts.rows[number, j])
            assert text[row - 1] == ids.QUESTION
            hops, value = state[text[row]]
            assert value == int(prompts.answers[number, j])
            assert kind == (f"hops-{hops}" if task == "tracking" else "retrieval")
            name = text[row]
            for _ in range(hops):
                name = lines[name][2]
            place, token, _ = lines[name]
            assert token == (ids.SET if task == "tracking" else ids.FACT)
            assert float(prompts.depths[number, j]) == pytest.approx((place + 2) / (tokens - 1), abs=1e-6)


@pytest.mark.parametrize("task", ["retrieval", "tracking"])
def test_text_has_lines_that_nobody_asks_for_and_names_without_values(task):
    prompts = samples.prompts(task, 1024, batch=2, questions=4, seed=1)
    for text, rows in zip(prompts.inputs["input_ids"].tolist(), prompts.rows.tolist(), strict=True):
        state, lines = assigned(text)
        asked = {state[text[row]][1] for row in rows}
        assert len(asked) == 4
        assert len({value for _, value in state.values()} - asked) >= 4
        inside = {at for place, token, _ in lines.values() for at in range(place, place + 3)} | set(rows)
        mentions = [t for i, t in enumerate(text) if ids.KEYS <= t < ids.VALUES and i not in inside]
        assert len(mentions) == texts.MENTIONS
        assert set(mentions) <= set(state)


@pytest.mark.parametrize("task", ["retrieval", "tracking"])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_lines_of_text_are_where_they_are_asked_for(task, depth):
    prompts = samples.prompts(task, 4096, batch=4, questions=8, seed=2, depth=depth)
    assert (prompts.depths - depth).abs().max() < 0.05
    one, other = (samples.prompts(task, 4096, batch=4, questions=8, seed=seed) for seed in (2, 3))
    assert one.depths.std() > 0.1
    assert not torch.equal(one.inputs["input_ids"], other.inputs["input_ids"])
    again = samples.prompts(task, 4096, batch=4, questions=8, seed=2)
    assert torch.equal(one.inputs["input_ids"], again.inputs["input_ids"])


def test_the_longest_chains_that_fit_are_drawn():
    cut = texts.cut("tracking", 555, texts.SIZE // 3)
    sample = texts.draw(cut, 8, samples.training_generator(4), depth=1.0)
    assert sample.places.diff(dim=-1).min() >= 4  # a chain's lines rise
    begins = sample.places.flatten(1).sort(-1).values
    assert begins.diff(dim=-1).min() >= 4  # and no line covers another
    with pytest.raises(ValueError, match="22 questions"):
        texts.cut("tracking", 4096, 22)
    with pytest.raises(ValueError, match="need 555 tokens, more than 554"):
        texts.cut("tracking", 554, 21)
    with pytest.raises(ValueError, match="more than 40"):
        samples.prompts("retrieval", 40, batch=1, questions=6, seed=0)


def test_text_training_runs_the_models_own_arithmetic(training):
    recipe = training.recipes.start("text", "cpu", 0, tiny=True, compiled=False)
    recipe.dtype = recipe.decoder.dtype = torch.float32
    sample = recipe.draw(2, 2, 2)
    with torch.no_grad():
        last = recipe.decoder(recipe.embed(sample), torch.arange(512).expand(2, -1))[-1]
        wanted = recipe.model(**texts.processed(sample)).logits
        torch.testing.assert_close(last @ recipe.model.lm_head.weight.T, wanted, atol=2e-6, rtol=0)


def test_read_outs_of_text_are_at_their_tokens(training):
    recipe = training.recipes.start("text", "cpu", 0, tiny=True, compiled=False)
    cut = next(cut for cut in recipe.cuts[0] if cut.task == "tracking")
    sample = texts.draw(cut, 2, recipe.generator)
    for number, text in enumerate(sample.tokens.tolist()):
        state, lines = assigned(text)
        for chain, value in zip(range(cut.chains), sample.values[number].tolist(), strict=True):
            for link in range(cut.links):
                name = ids.KEYS + int(sample.names[number, chain, link])
                assert int(sample.places[number, chain, link]) == lines[name][0] + 2
                assert state[name] == (link, ids.VALUES + value)
    losses, right = recipe.losses(sample)
    assert losses.keys() == recipe.weights.keys()
    assert right.shape == (2, 6)
    positions = training.text_recipe.jumps(sample, 50, torch.Generator().manual_seed(1))
    steps = positions.diff(dim=-1)
    assert steps.min() == 1
    assert 1 < steps.max() <= 1 + 50
    inside = sample.index.segment.diff() == 0
    assert (steps[:, inside] == 1).all()


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="v-niah"):
        samples.prompts("niah", 256, batch=1, questions=2, seed=0)
    with pytest.raises(ValueError, match="40 questions"):
        samples.prompts("v-niah", 8192, batch=1, questions=40, seed=0)
    with pytest.raises(ValueError, match=r"depth 1\.5"):
        samples.prompts("v-niah", 256, batch=1, questions=2, seed=0, depth=1.5)
    with pytest.raises(ValueError, match="64 tokens"):
        samples.prompts("mm-niah", 64, batch=1, questions=2, seed=0)


@pytest.mark.parametrize("level", [0, 2])
def test_training_runs_the_models_own_arithmetic(training, level):
    recipe = training.recipes.start("vision", "cpu", 0, tiny=True, compiled=False)
    recipe.dtype = recipe.decoder.dtype = torch.float32
    sample = recipe.draw(level, 2, level)
    with torch.no_grad():
        embedded, _ = recipe.embed(sample)
        last = recipe.decoder(embedded, sample.index.positions[:, None].expand(-1, 2, -1))[-1]
        wanted = recipe.model(**videos.processed(sample)).logits
        torch.testing.assert_close(last @ recipe.model.lm_head.weight.T, wanted, atol=2e-6, rtol=0)


def test_a_tiny_run_learns_and_leaves_a_model(training, tmp_path, monkeypatch):
    monkeypatch.setattr(training.train, "WARM_UP", 5)
    argv = ["--task", "vision", "--tiny", "--steps", "50", "--step-tokens", "512", "--device", "cpu", "--every", "0"]
    log = training.train.main([*argv, "--prompts", "1", "--out", str(tmp_path), "--json", str(tmp_path / "log.json")])
    first, last = log["log"][0], log["log"][-1]
    assert (log["steps"], last["step"]) == (50, 50)
    assert last["pixels"] < 0.8 * first["pixels"]
    assert last["glyph"] < first["glyph"] - 0.1
    written = json.loads((tmp_path / "log.json").read_text())
    assert written["summary"].keys() == {"v-niah", "mm-niah"}
    assert (tmp_path / "model.safetensors").stat().st_size == log["bytes"]


def test_a_tiny_run_of_text_learns_and_leaves_a_model(training, tmp_path, monkeypatch):
    monkeypatch.setattr(training.train, "WARM_UP", 5)
    monkeypatch.setattr(training.train, "RATE", 5e-3)
    argv = ["--task", "text", "--tiny", "--steps", "75", "--step-tokens", "512", "--device", "cpu", "--every", "0"]
    log = training.train.main([*argv, "--prompts", "1", "--out", str(tmp_path)])
    first, last = log["log"][0], log["log"][-1]
    assert last["text"] < first["text"] - 0.2
    assert last["answer"] < first["answer"] - 0.4
    assert last["assigned"] < first["assigned"] - 0.1
    assert log["summary"].keys() == {"retrieval", "tracking"}


@pytest.mark.parametrize("kind", models.KINDS)
def test_weights_survive_saving(kind, tmp_path):
    model = models.build(kind, hidden=64, layers=2).to(torch.bfloat16).eval()
    models.save(model, kind, tmp_path)
    again = models.restore(kind, tmp_path, dtype=torch.bfloat16)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert again.lm_head.weight is again.get_input_embeddings().weight
    assert not again.training
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        models.restore(kind, tmp_path)


def test_the_shipped_shape_fits(tmp_path):
    assert models.save(models.build("vision"), "vision", tmp_path) < models.LARGEST
    assert models.save(models.build("text"), "text", tmp_path) < 6_000_000


@pytest.mark.parametrize("task", samples.TASKS)
def test_the_shipped_model_answers(training, task):
    kind = "vision" if task in samples.VISION else "text"
    if not (models.WEIGHTS / kind / "model.safetensors").exists():
        pytest.skip("not trained yet")
    model = models.load(task)
    prompts = samples.prompts(task, 1024, batch=4, questions=6, seed=77)
    assert training.train.right_answers(model, prompts).float().mean() >= 0.95
