"""The production path, TensorRT and TensorRT-LLM, from checkpoint to answers, against doubles.

The doubles (tests/doubles) refuse what the originals' signatures refuse and compute what their
arguments say, so the answers must be those of `--decoder torch`.
"""

from __future__ import annotations

import gc
import json
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from build.conversion.convert import ConvertOptions
from build.engines import decoder_tensorrt_llm
from build.engines.build import BuildRun, build_engine
from build.engines.specification import BuildOptions, specify
from frontends.triton.tensorrt_llm import request_tensors
from nvlm.formats.checkpoint_config import CheckpointConfig
from nvlm.planning import tensorrt_llm_package
from nvlm.planning.tensorrt_package import make_logger
from nvlm.program import command_line
from nvlm.program.errors import UserError
from nvlm.program.launcher import World
from runtime.decoder.executor import (
    DecoderOptions,
    DecoderRequest,
    create_decoder_executor,
)
from runtime.engine.engine_dir import EngineDir
from runtime.ranks.mpi import Job
from runtime.ranks.open_parts import open_engine_on_ranks, open_parts_on_ranks, work
from runtime.requests.guide import Guide
from runtime.requests.sampling import SETTINGS, SamplingParams
from runtime.requests.types import Answer, GenerationRequest, GenerationResult
from runtime.serving.loop import Loop
from runtime.serving.runner import Runner
from runtime.serving.ticket import Ticket
from tests.conftest import TINY, Workshop
from tests.doubles.ranks import mpirun
from tests.doubles.tensorrt_llm import Doubles, installed
from tests.support.cases import QUESTIONS, SEVEN_TILES, THREE_IMAGES
from tests.support.command import BUILD, ROOT, RUN, one_line_error, refused, run_command, script
from tests.support.decoding import generate
from tests.support.tolerances import FLOAT16_ONNX, FP8_LOGITS

rtx = pytest.importorskip("tensorrt_rtx")

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
GPU_BYTES = 80 << 30
SHAPE = replace(TINY, num_attention_heads=8, num_key_value_heads=2, vision_num_hidden_layers=1)
OPTIONS = BuildOptions(max_num_images=3, vision_precision="float16")
NEW_TOKENS = 12


@pytest.fixture(scope="module")
def doubles() -> Iterator[Doubles]:
    with installed(rtx) as found:
        yield found


def checkpoint(workshop: Workshop, tp_size: int) -> Path:
    model = workshop.model("model_8_heads", SHAPE)
    options = ConvertOptions(calib_size=4, tp_size=tp_size)
    return workshop.checkpoint(f"checkpoint_8_heads_tp{tp_size}", model, options)


@pytest.fixture(scope="module")
def built(workshop: Workshop, doubles: Doubles) -> Any:
    """Builds with the doubles, once per number of ranks."""

    def build(tp_size: int = 1) -> Path:
        path = workshop.root / f"engine_tensorrt_llm_tp{tp_size}"
        if not path.exists():
            spec = specify(checkpoint(workshop, tp_size), OPTIONS, CUDA, GPU_BYTES)
            build_engine(spec, path, OPTIONS, BuildRun(workers=2))
        return path

    return build


@pytest.fixture(scope="module")
def reference(workshop: Workshop) -> Runner:
    """The torch decoder after the same float16 graph in ONNX Runtime, on one rank."""
    options = {"decoder": "torch", "vision": "onnxruntime", "vision_precision": "float16"}
    path = workshop.engine(
        "engine_8_heads_torch", checkpoint(workshop, 1), max_num_images=3, **options
    )
    return Runner.open(path, CPU)


def requests() -> list[GenerationRequest]:
    """No image, one of one tile, one of seven, three of several."""
    return [
        GenerationRequest.images_first(q.text, q.paths, max_new_tokens=NEW_TOKENS)
        for q in QUESTIONS
    ]


def answers(runner: Runner, asked: list[GenerationRequest]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for index, result in runner.generate_batch(asked):
        assert isinstance(result, GenerationResult), result
        found[index] = result.token_ids
    return [found[index] for index in range(len(asked))]


@pytest.fixture(params=[1, 2, 8], ids="tp{}".format)
def runner(
    built: Any, doubles: Doubles, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Runner]:
    """Rank 0, with the other ranks working beside it."""
    size, path = request.param, built(request.param)

    def follow(rank: int) -> None:
        job = Job(World(size, rank))
        work(open_engine_on_ranks(path, CUDA, job), CUDA, job, DecoderOptions())

    with (
        mpirun(doubles.executor, size, follow, tmp_path),
        Runner.open(path, CUDA) if size == 1 else lead(path, size) as runner,
    ):
        yield runner


def lead(path: Path, size: int) -> Runner:
    """Opens rank 0 of `size`."""
    job = Job(World(size, 0))
    engine = open_engine_on_ranks(path, CUDA, job)
    return Runner(engine, *open_parts_on_ranks(engine, CUDA, job, DecoderOptions()))


class TestBuild:
    @pytest.mark.parametrize("tp_size", [1, 2, 8])
    def test_every_rank_gets_an_engine_and_auto_picks_the_production_targets(
        self, built: Any, tp_size: int
    ) -> None:
        engine = EngineDir.read(built(tp_size))
        assert (engine.decoder_target, engine.vision_executor) == ("tensorrt_llm", "tensorrt")
        assert sorted(path.name for path in (engine.directory / "llm").iterdir()) == sorted(
            ["config.json", "decoder.json", *(f"rank{rank}.engine" for rank in range(tp_size))]
        )
        assert sorted(path.name for path in (engine.directory / "vision").iterdir()) == [
            "config.json",
            "model.engine",
            "summary.json",
        ]
        assert engine.packages == {
            "tensorrt": "10.14.1.48",
            "tensorrt_llm": "1.2.1",
            "compute_capability": "9.0",
        }

    def test_one_profile_reaches_from_a_tile_over_a_request_to_a_batch(
        self, built: Any, doubles: Doubles
    ) -> None:
        plan = (built() / "vision" / "model.engine").read_bytes()
        engine = doubles.tensorrt.Runtime(make_logger(doubles.tensorrt)).deserialize_cuda_engine(
            plan
        )
        shapes = engine.get_tensor_profile_shape("tiles", 0)
        assert [shape[0] for shape in shapes] == [1, OPTIONS.max_num_images * 7, 8 * 7]

    def test_timings_of_an_earlier_build_are_read_by_the_next(
        self, workshop: Workshop, doubles: Doubles, tmp_path: Path
    ) -> None:
        """This is the decoder; test_vision_tensorrt has the vision engine."""
        options = replace(OPTIONS, vision="torch", vision_precision=None)
        spec = specify(checkpoint(workshop, 1), options, CUDA, GPU_BYTES)
        cache = str(tmp_path / "timings" / "llm.cache")
        for name, expected in (("first", None), ("second", cache)):
            run = BuildRun(timing_cache=tmp_path / "timings")
            build_engine(spec, tmp_path / name, options, run)
            config = doubles.builds[-1]["build_config"]
            assert (config.input_timing_cache, config.output_timing_cache) == (expected, cache)

    @pytest.mark.parametrize("version", ["1.2.0", "1.3.0rc29"])
    def test_auto_looks_at_the_version_of_tensorrt_llm(
        self,
        workshop: Workshop,
        doubles: Doubles,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        version: str,
    ) -> None:
        monkeypatch.setattr(tensorrt_llm_package, "installed_version", lambda: version)
        with caplog.at_level(logging.INFO):
            spec = specify(checkpoint(workshop, 1), OPTIONS, CUDA, GPU_BYTES)
        assert spec.decoder == "torch"
        assert f"decoder: torch (tensorrt_llm {version} is installed, expected 1.2.1)" in (
            caplog.text
        )
        asked = replace(OPTIONS, decoder="tensorrt_llm")
        with pytest.raises(UserError, match=f"{version} is installed, expected 1.2.1: pip install"):
            specify(checkpoint(workshop, 1), asked, CUDA, GPU_BYTES)

    def test_another_gpu_than_hopper_is_refused_by_the_builder_as_by_the_doctor(
        self, workshop: Workshop, doubles: Doubles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doubles.gpu, "capability", (8, 9))
        asked = replace(OPTIONS, decoder="tensorrt_llm")
        with pytest.raises(UserError, match=r"capability 8\.9, its FP8 engines are for Hopper"):
            specify(checkpoint(workshop, 1), asked, CUDA, GPU_BYTES)

    def test_the_prompt_table_holds_a_whole_batch_of_the_largest_requests(
        self, built: Any, doubles: Doubles
    ) -> None:
        limits = EngineDir.read(built()).limits
        settings = doubles.builds[0]["build_config"]
        rows = OPTIONS.max_num_images * 7 * 4  # images x tiles x tokens of a tile
        assert settings.max_prompt_embedding_table_size == limits.max_batch_size * rows
        assert settings.max_input_len == limits.max_input_len
        assert settings.max_num_tokens >= limits.max_input_len

    def test_a_head_in_fp8_is_built_by_what_its_list_says(
        self, workshop: Workshop, doubles: Doubles, tmp_path: Path
    ) -> None:
        """Its builder makes an FP8Linear of a head that exclude_modules does not name."""
        model = workshop.model("model_8_heads", SHAPE)
        chosen = ConvertOptions(calib_size=4, tp_size=2, quantize_lm_head=True)
        path = workshop.checkpoint("checkpoint_8_heads_fp8_head", model, chosen)
        options = replace(OPTIONS, vision="torch", vision_precision=None)
        spec = specify(path, options, CUDA, GPU_BYTES)
        assert spec.decoder == "tensorrt_llm"
        build_engine(spec, tmp_path / "engine", options, BuildRun(workers=2))
        assert EngineDir.read(tmp_path / "engine").checkpoint_config.quantize_lm_head

    @pytest.mark.parametrize("workers", [1, 3, 100])
    def test_workers_are_at_most_one_a_rank_and_one_a_gpu(
        self, workshop: Workshop, doubles: Doubles, tmp_path: Path, workers: int
    ) -> None:
        options = replace(OPTIONS, vision="torch", vision_precision=None)
        spec = specify(checkpoint(workshop, 2), options, CUDA, GPU_BYTES)
        build_engine(spec, tmp_path / "engine", options, BuildRun(workers=workers))
        assert doubles.builds[-1]["workers"] == min(workers, 2)

    @pytest.mark.parametrize(
        ("optimize_for", "plugins"),
        [
            ("latency", {"low_latency_gemm_plugin": "fp8", "gemm_swiglu_plugin": None}),
            ("throughput", {"low_latency_gemm_plugin": None, "gemm_swiglu_plugin": "fp8"}),
        ],
    )
    def test_plugins_follow_what_the_engine_is_optimised_for(
        self,
        workshop: Workshop,
        doubles: Doubles,
        tmp_path: Path,
        optimize_for: Any,
        plugins: dict[str, Any],
    ) -> None:
        options = replace(OPTIONS, vision="torch", vision_precision=None, optimize_for=optimize_for)
        spec = specify(checkpoint(workshop, 1), options, CUDA, GPU_BYTES)
        cache = BuildRun(timing_cache=tmp_path / "cache")
        build_engine(spec, tmp_path / "engine", options, cache)
        settings = doubles.builds[-1]["build_config"]
        found = vars(settings.plugin_config)
        assert {name: found[name] for name in plugins} == plugins
        assert found["use_fp8_context_fmha"]
        assert found["use_paged_context_fmha"]
        assert settings.output_timing_cache == str(tmp_path / "cache" / "llm.cache")

    @pytest.mark.parametrize("optimize_for", ["latency", "throughput"])
    @pytest.mark.parametrize("tp_size", [1, 2])
    def test_every_plugin_setting_is_a_field_and_reads_as_it_was_set(
        self, workshop: Workshop, doubles: Doubles, optimize_for: Any, tp_size: int
    ) -> None:
        config = CheckpointConfig.read(checkpoint(workshop, tp_size) / "config.json")
        plugins = decoder_tensorrt_llm.plugin_config(config, optimize_for)
        settings = decoder_tensorrt_llm.plugin_settings(config, optimize_for)
        assert settings.keys() <= plugins.model_fields.keys()
        found = {name: getattr(plugins, name) for name in settings}
        autos = {name for name, value in settings.items() if value == "auto"}
        assert found == settings | dict.fromkeys(autos, "bfloat16")

    def test_a_plugin_setting_unknown_to_the_installed_class_is_refused_before_anything_is_compiled(
        self,
        workshop: Workshop,
        doubles: Doubles,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from tensorrt_llm.plugin import PluginConfig

        monkeypatch.delitem(PluginConfig.model_fields, "gemm_swiglu_plugin")
        where = ("--checkpoint_dir", checkpoint(workshop, 1), "--engine_dir", tmp_path / "engine")
        fragments = ("tensorrt_llm 1.2.1 has no plugin setting gemm_swiglu_plugin; pip install",)
        refused(tmp_path, BUILD, *where, "--vision_precision", "float16", fragments=fragments)
        refused(tmp_path, BUILD, *where, "--dry_run", fragments=fragments)

    def test_a_plugin_setting_that_reads_otherwise_is_refused(
        self, workshop: Workshop, doubles: Doubles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from tensorrt_llm import plugin

        class Deaf(plugin.PluginConfig):  # type: ignore[misc]
            def __init__(self, **named: Any) -> None:
                super().__init__(**named | {"use_fused_mlp": False})

        monkeypatch.setattr(plugin, "PluginConfig", Deaf)
        message = "setting use_fused_mlp of tensorrt_llm 1.2.1 reads as False, expected True; pip"
        with pytest.raises(UserError, match=message):
            specify(checkpoint(workshop, 1), OPTIONS, CUDA, GPU_BYTES)

    def test_the_output_timing_cache_is_always_a_path(
        self, workshop: Workshop, doubles: Doubles, tmp_path: Path
    ) -> None:
        """Pydantic refuses None. What nobody asked to keep is gone after the build."""
        options = replace(OPTIONS, vision="torch", vision_precision=None)
        spec = specify(checkpoint(workshop, 1), options, CUDA, GPU_BYTES)
        build_engine(spec, tmp_path / "engine", options)
        settings = doubles.builds[-1]["build_config"]
        assert settings.input_timing_cache is None
        cache = Path(settings.output_timing_cache)
        assert cache.parent.name == "llm"
        assert not list((tmp_path / "engine").rglob(cache.name))

    @pytest.mark.parametrize("asked", [None, 10**6])
    def test_max_num_tokens_is_recorded_as_the_builder_clips_it(
        self,
        workshop: Workshop,
        doubles: Doubles,
        tmp_path: Path,
        caplog: pytest.LogCaptureFixture,
        asked: int | None,
    ) -> None:
        options = replace(
            OPTIONS,
            vision="torch",
            vision_precision=None,
            max_batch_size=1,
            max_num_tokens=asked,
        )
        with caplog.at_level(logging.INFO):
            spec = specify(checkpoint(workshop, 1), options, CUDA, GPU_BYTES)
        build_engine(spec, tmp_path / "engine", options)
        most = spec.limits.max_seq_len
        assert most < 8192
        assert (f"--max_num_tokens 1000000 is clipped to {most}" in caplog.text) == bool(asked)
        assert spec.plan.limits.max_num_tokens == most
        for name in ("config.json", "decoder.json"):
            written = json.loads((tmp_path / "engine" / "llm" / name).read_text())
            assert written["build_config"]["max_num_tokens"] == most
        assert EngineDir.read(tmp_path / "engine").limits.max_num_tokens == most


class TestAnswers:
    def test_a_batch_of_none_one_and_three_images_gets_the_torch_decoders_tokens(
        self, runner: Runner, reference: Runner
    ) -> None:
        expected = answers(reference, requests())
        assert answers(runner, requests()) == expected
        assert len({tuple(tokens) for tokens in expected}) == len(expected)

    def test_two_pictures_with_equal_token_ids_are_distinguished_and_the_same_one_is_known_again(
        self, runner: Runner, doubles: Doubles, tmp_path: Path
    ) -> None:
        """The double fails when (token id, extra id) pairs agree and tables do not."""
        first = SEVEN_TILES.paths[0]
        second = tmp_path / "mirrored.png"  # the same grid, so the same token ids
        ImageOps.mirror(Image.open(first)).save(second)
        for path in (first, second, first):
            runner.generate(GenerationRequest.images_first("What?", (path,), max_new_tokens=2))
        numbers = [
            set(request.prompt_tuning_config.input_token_extra_ids) - {0}
            for request in doubles.executor.executors[-1].requests.values()
        ]
        assert [len(found) for found in numbers] == [1, 1, 1]
        assert min(numbers[0] | numbers[1]) >= 2**40, "few bits would be shared by chance"
        assert numbers[0] == numbers[2]
        assert numbers[0] != numbers[1]

    def test_each_image_of_a_request_has_its_own_number(
        self, runner: Runner, doubles: Doubles
    ) -> None:
        request = GenerationRequest.images_first("What?", THREE_IMAGES.paths, max_new_tokens=1)
        runner.generate(request)
        (sent,) = doubles.executor.executors[-1].requests.values()
        extra = sent.prompt_tuning_config.input_token_extra_ids
        runs = [number for i, number in enumerate(extra) if number and number not in extra[:i]]
        assert len(runs) == len(THREE_IMAGES.paths)
        counts = [sum(number == run for number in extra) for run in runs]
        assert counts == [4 * tiles for tiles in THREE_IMAGES.num_tiles]

    def test_the_time_of_vision_ends_when_the_gpu_has_done_it(
        self, runner: Runner, doubles: Doubles
    ) -> None:
        ticket = Ticket(requests()[1])
        runner.prepare(ticket)
        runner.encode(ticket)
        assert not doubles.gpu.is_busy

    def test_streaming_gives_the_text_piece_by_piece(self, runner: Runner) -> None:
        request = requests()[1]
        whole = runner.generate(request).text
        pieces = [piece.text for piece in runner.stream(request)]
        assert 1 < len(pieces) <= NEW_TOKENS, "a token in the middle of a character adds no text"
        assert all(pieces[:-1])
        assert "".join(pieces) == whole

    def test_a_cancelled_request_gives_nothing_more_and_the_others_continue(
        self, runner: Runner, reference: Runner
    ) -> None:
        kept, gone = requests()[0], requests()[1]
        expected = answers(reference, [kept])[0]
        pieces: list[Answer] = []
        unwanted: list[Answer] = []
        with Loop(runner, max_open=2) as loop:
            loop.submit(kept, pieces.append)
            ticket = loop.submit(gone, unwanted.append)
            loop.turn()
            loop.cancel(ticket)
            unwanted.clear()
            while loop.num_open:
                loop.turn()
        assert unwanted == []
        assert pieces[-1].result is not None
        assert pieces[-1].result.token_ids == expected

    def test_an_error_of_the_executor_fails_its_request_alone(
        self, runner: Runner, reference: Runner, doubles: Doubles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doubles.executor, "faults", {2: "Prompt length exceeds maximum"})
        asked = requests()
        found = dict(runner.generate_batch(asked, in_order=True))
        assert isinstance(found[1], UserError)
        assert "Prompt length exceeds maximum" in str(found[1])
        expected = answers(reference, asked)
        for index in (0, 2, 3):
            result = found[index]
            assert isinstance(result, GenerationResult)
            assert result.token_ids == expected[index]

    @pytest.mark.parametrize("includes_end_token", [False, True])
    def test_stop_tokens_end_an_answer_and_are_not_part_of_it(
        self,
        built: Any,
        doubles: Doubles,
        monkeypatch: pytest.MonkeyPatch,
        includes_end_token: bool,
    ) -> None:
        """Whichever way the executor says it."""
        monkeypatch.setattr(doubles.executor, "includes_end_token", includes_end_token)
        decoder = create_decoder_executor(EngineDir.read(built()), CUDA)
        request = DecoderRequest(list(range(9)), max_new_tokens=12)
        ((ids, reason),) = generate(decoder, [request])
        assert (len(ids), reason) == (12, "length")
        cut = next(i for i in range(11, 0, -1) if ids[i] not in ids[:i])
        unused = max(set(range(512)) - set(ids))
        stopping = replace(request, stop_ids=frozenset({ids[cut]}))
        assert generate(decoder, [stopping]) == [(ids[:cut], "stop")]
        both = replace(request, stop_ids=frozenset({ids[cut], unused}))
        assert generate(decoder, [both])[0][0] == ids[:cut]
        sent = list(doubles.executor.executors[-1].requests.values())[-1]
        assert [sent.end_id, *(word for (word,) in sent.stop_words)] == sorted(both.stop_ids)

    def test_sampling_settings_reach_the_executor(self, built: Any, doubles: Doubles) -> None:
        decoder = create_decoder_executor(EngineDir.read(built()), CUDA)
        sampling = SamplingParams(temperature=0.7, top_k=9, top_p=0.8, seed=2**63)
        decoder.submit(DecoderRequest([1, 2, 3], 4, sampling=sampling))
        decoder.submit(DecoderRequest([1, 2, 3], 4))
        first, second = doubles.executor.executors[-1].requests.values()
        config = first.sampling_config
        found = (config.temperature, config.top_k, config.top_p, config.seed)
        assert found == (0.7, 9, 0.8, 2**63)
        assert second.sampling_config.top_k == 1

    @pytest.mark.parametrize("stop_ids", [(), (9,), (9, 3, 400)])
    @pytest.mark.parametrize(
        "sampling",
        [
            SamplingParams(),
            SamplingParams(temperature=0.7, top_k=1, top_p=0.5, seed=3),
            SamplingParams(temperature=0.75),
            SamplingParams(temperature=0.5, top_k=9, top_p=0.25, seed=2**63 + 1),
            SamplingParams(
                repetition_penalty=1.25,
                presence_penalty=0.5,
                frequency_penalty=-0.25,
                logit_bias={4: 1.5, 7: -100.0},
                logprobs=True,
            ),
        ],
    )
    def test_the_executor_and_tritons_backend_are_given_the_same(
        self, built: Any, doubles: Doubles, sampling: SamplingParams, stop_ids: tuple[int, ...]
    ) -> None:
        """One request in both dialects, with pictures whose keys begin with 0 and with unequal
        bytes. A value is exact in float32, which the backend's tensors are."""
        engine = EngineDir.read(built())
        decoder = create_decoder_executor(engine, CUDA)
        config = engine.checkpoint_config.decoder
        vocab_size = config.vocab_size
        request = DecoderRequest(
            token_ids=[5, vocab_size, vocab_size + 1, 6, vocab_size + 2, 7],
            max_new_tokens=2,
            prompt_table=torch.arange(3.0)[:, None].expand(3, config.hidden_size),
            cache_keys=(bytes(range(1, 33)), bytes(8) + b"k" * 24),
            rows_per_image=(2, 1),
            stop_ids=frozenset(stop_ids),
            sampling=sampling,
            bad_words=((5,), (6, 7)),
            guide=Guide("regex", "[ab]+"),
        )
        decoder.submit(request)
        (sent,) = doubles.executor.executors[-1].requests.values()
        tensors = request_tensors(request, 2, vocab_size, torch.bfloat16)

        extra = tensors["prompt_table_extra_ids"].tolist()
        assert [sent.prompt_tuning_config.input_token_extra_ids] == extra
        assert extra == [[0, 0x0807060504030201, 0x0807060504030201, 0, 1, 0]]
        table = tensors["prompt_embedding_table"]
        assert isinstance(table, torch.Tensor)
        assert torch.equal(sent.prompt_tuning_config.embedding_table.cpu(), table[0])
        assert [[-1 if sent.end_id is None else sent.end_id]] == tensors["end_id"].tolist()
        for row in SETTINGS:
            if row.trtllm_keyword is None or row.trtllm_tensor is None:
                continue
            value = getattr(sent.sampling_config, row.trtllm_keyword)
            found = tensors.get(row.trtllm_tensor)
            assert (None if found is None else found.tolist()) == (
                None if value is None else [[value]]
            ), row.name
        assert sent.bad_words == [[5], [6, 7]]
        assert tensors["bad_words_list"].tolist() == [[[5, 6, 7], [1, 3, -1]]]
        bias = tensors.get("embedding_bias")
        assert (bias is None) == (sent.embedding_bias is None) == (not sampling.logit_bias)
        assert bias is None or bias[0].tolist() == sent.embedding_bias.tolist()
        assert ("return_log_probs" in tensors) == sampling.logprobs
        assert sent.output_config.return_log_probs == sampling.logprobs
        guided = sent.guided_decoding_params
        assert guided.guide_type.name.lower().encode() == (
            tensors["guided_decoding_guide_type"].item()
        )
        assert guided.guide.encode() == tensors["guided_decoding_guide"].item()

    def test_a_request_without_rows_has_no_table_in_either_dialect(
        self, built: Any, doubles: Doubles
    ) -> None:
        engine = EngineDir.read(built())
        config = engine.checkpoint_config.decoder
        empty = DecoderRequest([1, 2], 2, prompt_table=torch.empty(0, config.hidden_size))
        create_decoder_executor(engine, CUDA).submit(empty)
        (sent,) = doubles.executor.executors[-1].requests.values()
        assert sent.prompt_tuning_config is None
        tensors = request_tensors(empty, 2, config.vocab_size, torch.bfloat16)
        assert not any("prompt" in name for name in tensors)

    def test_logits_come_where_they_were_asked_for_at_load(self, built: Any) -> None:
        options = DecoderOptions(gather_logits=True)
        decoder = create_decoder_executor(EngineDir.read(built()), CUDA, options)
        decoder.submit(DecoderRequest([1, 2, 3], 4, return_logits=True))
        outputs = [output for step in iter(decoder.step, []) for output in step]
        assert len(outputs) == 4
        for output in outputs:
            assert output.logits is not None
            assert int(output.logits.argmax()) == output.token_id

    @pytest.mark.parametrize("includes_end_token", [False, True])
    def test_the_token_that_ends_an_answer_has_its_logits_too(
        self,
        built: Any,
        doubles: Doubles,
        monkeypatch: pytest.MonkeyPatch,
        includes_end_token: bool,
    ) -> None:
        """An end id would bring no row: all stop ids are stop words."""
        monkeypatch.setattr(doubles.executor, "includes_end_token", includes_end_token)
        options = DecoderOptions(gather_logits=True)
        decoder = create_decoder_executor(EngineDir.read(built()), CUDA, options)
        request = DecoderRequest(list(range(9)), max_new_tokens=12, return_logits=True)
        ((ids, _),) = generate(decoder, [request])
        cut = next(i for i in range(11, 0, -1) if ids[i] not in ids[:i])
        stop_ids = frozenset({ids[cut], max(set(range(512)) - set(ids))})
        decoder.submit(replace(request, stop_ids=stop_ids))
        outputs = [output for step in iter(decoder.step, []) for output in step]
        assert [output.token_id for output in outputs] == [*ids[:cut], None]
        assert [output.finish_reason for output in outputs] == [*[None] * cut, "stop"]
        rows = [output.logits for output in outputs]
        assert [None if row is None else int(row.argmax()) for row in rows] == ids[: cut + 1]
        sent = list(doubles.executor.executors[-1].requests.values())[-1]
        assert sent.end_id is None
        assert sent.stop_words == [[token_id] for token_id in sorted(stop_ids)]


class TestLoad:
    def test_limits_and_memory_fraction_reach_the_executor(
        self, built: Any, doubles: Doubles
    ) -> None:
        engine = EngineDir.read(built())
        create_decoder_executor(engine, CUDA, DecoderOptions(0.5))
        config = doubles.executor.executors[-1].config
        assert config.kv_cache_config.free_gpu_memory_fraction == 0.5
        assert config.kv_cache_config.enable_block_reuse
        assert config.enable_chunked_context
        assert config.max_batch_size == engine.limits.max_batch_size

    def test_an_engine_that_records_more_tokens_a_step_than_it_has_still_runs(
        self, built: Any, doubles: Doubles, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """As one from before the clipping does; the runtime ignores the larger value."""
        engine = EngineDir.read(built())
        recorded = replace(engine.limits, max_num_tokens=10**6)
        request = DecoderRequest([1, 2, 3], 4)
        expected = generate(create_decoder_executor(engine, CUDA), [request])
        decoder = create_decoder_executor(replace(engine, limits=recorded), CUDA)
        assert generate(decoder, [request]) == expected
        assert "[WARNING] max_num_tokens" in capfd.readouterr().err

    def test_a_closed_decoder_lets_go_of_the_executor_and_its_memory(
        self, built: Any, doubles: Doubles
    ) -> None:
        decoder = create_decoder_executor(EngineDir.read(built()), CUDA)
        decoder.submit(DecoderRequest([1, 2, 3], 4))
        opened = weakref.ref(doubles.executor.executors.pop())
        decoder.close()
        gc.collect()
        assert opened() is None

    @pytest.mark.parametrize(
        ("package", "version"),
        [("tensorrt", "10.13.3.9"), ("tensorrt_llm", "1.2.0"), ("tensorrt_llm", "1.3.0rc29")],
    )
    def test_another_version_is_refused_with_both_named(
        self,
        built: Any,
        doubles: Doubles,
        monkeypatch: pytest.MonkeyPatch,
        package: str,
        version: str,
    ) -> None:
        path = built()
        monkeypatch.setattr(getattr(doubles, package), "__version__", version)
        with pytest.raises(UserError, match=rf"{package} .*{version}"):
            Runner.open(path, CUDA)

    def test_another_gpu_is_refused(
        self, built: Any, doubles: Doubles, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = built()
        monkeypatch.setattr(doubles.gpu, "capability", (8, 9))
        with pytest.raises(UserError, match=r"compute capability 9.0 but cuda has 8.9"):
            Runner.open(path, CUDA)

    def test_a_cpu_is_refused(self, built: Any) -> None:
        with pytest.raises(UserError, match="need its GPU, but it is to run on cpu"):
            Runner.open(built(), CPU)

    def test_a_wrong_number_of_ranks_is_refused(self, built: Any) -> None:
        with pytest.raises(UserError, match="use mpirun -n 2"):
            Runner.open(built(2), CUDA)

    def test_a_vision_engine_of_another_version_is_refused_with_tensorrts_words(
        self, fresh: Workshop, workshop: Workshop, doubles: Doubles
    ) -> None:
        from runtime.vision.tensorrt_executor import TensorrtVisionExecutor

        path = fresh.root / "model.engine"
        path.write_bytes(b"of another version")
        with pytest.raises(UserError, match="magicTag; build the engine again"):
            TensorrtVisionExecutor(doubles.tensorrt, path, CUDA)


def test_an_engine_that_cannot_fit_its_gpu_is_refused_before_it_is_built(
    workshop: Workshop, doubles: Doubles
) -> None:
    from build.engines.specification import require_fit

    spec = specify(checkpoint(workshop, 1), OPTIONS, CUDA, 2 << 30)
    with pytest.raises(UserError, match=r"a rank needs .* GB .* larger --tp_size"):
        require_fit(spec, 2 << 30)


def test_a_directory_up_to_date_is_not_built_again_but_another_version_is(
    built: Any, workshop: Workshop, doubles: Doubles, monkeypatch: pytest.MonkeyPatch
) -> None:
    from build.engines.build import is_up_to_date

    path = built()
    spec = specify(checkpoint(workshop, 1), OPTIONS, CUDA, GPU_BYTES)
    assert is_up_to_date(spec, path, OPTIONS)
    monkeypatch.setattr(doubles.tensorrt, "__version__", "10.14.2.0")
    spec = specify(checkpoint(workshop, 1), OPTIONS, CUDA, GPU_BYTES)
    assert not is_up_to_date(spec, path, OPTIONS)


@pytest.fixture(scope="module")
def executor(built: Any, doubles: Doubles) -> Any:
    """The double itself, opened by the product."""
    create_decoder_executor(EngineDir.read(built()), CUDA)
    return doubles.executor.executors[-1]


class TestStrictness:
    """What the doubles refuse: without this the tests above would prove nothing."""

    def test_unknown_and_missing_arguments_and_mixed_devices(self, doubles: Doubles) -> None:
        executor = doubles.executor
        with pytest.raises(TypeError, match="unexpected keyword argument 'max_new_tokens'"):
            executor.Request(input_token_ids=[1], max_tokens=4, max_new_tokens=4)
        with pytest.raises(TypeError, match="missing a required argument: 'max_tokens'"):
            executor.Request(input_token_ids=[1])
        with pytest.raises(AttributeError, match="no attribute cache"):
            executor.KvCacheConfig().cache = 1
        mixed = torch.ones(2, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            mixed + torch.ones(2)
        with pytest.raises(TypeError, match="numpy"):
            mixed.numpy()
        assert json.dumps(str(mixed.device)) == '"cuda:0"'

    def request(self, doubles: Doubles, table: Any, extra: list[int] | None) -> Any:
        trtllm = doubles.executor
        return trtllm.Request(
            input_token_ids=[1, 512, 513, 2],
            max_tokens=2,
            streaming=True,
            sampling_config=trtllm.SamplingConfig(top_k=1),
            output_config=trtllm.OutputConfig(exclude_input_from_output=True),
            prompt_tuning_config=trtllm.PromptTuningConfig(table, extra),
        )

    @pytest.mark.parametrize(
        ("shape", "dtype", "device", "extra", "message"),
        [
            ((2, 128), torch.bfloat16, "cpu", [0, 7, 7, 0], "on the GPU"),
            ((2, 128), torch.float16, "cuda", [0, 7, 7, 0], "doesn't match model weight"),
            ((1, 2, 128), torch.bfloat16, "cuda", [0, 7, 7, 0], "shape"),
            ((9999, 128), torch.bfloat16, "cuda", [0, 7, 7, 0], "the runtime allocates"),
            ((2, 128), torch.bfloat16, "cuda", None, "would confuse pictures"),
            ((2, 128), torch.bfloat16, "cuda", [0, 7, 7], "one for every token"),
            ((2, 128), torch.bfloat16, "cuda", [0, 7, 0, 0], "a picture never"),
        ],
    )
    def test_a_wrong_table_or_wrong_extra_ids(
        self,
        executor: Any,
        doubles: Doubles,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: str,
        extra: list[int] | None,
        message: str,
    ) -> None:
        table = torch.zeros(shape, dtype=dtype, device=device)
        with pytest.raises((AssertionError, RuntimeError), match=message):
            executor.enqueue_request(self.request(doubles, table, extra))

    def test_an_end_id_brings_no_row_of_logits_and_a_stop_word_does(
        self, built: Any, doubles: Doubles
    ) -> None:
        options = DecoderOptions(gather_logits=True)
        decoder = create_decoder_executor(EngineDir.read(built()), CUDA, options)
        ((ids, _),) = generate(decoder, [DecoderRequest([1, 2, 3], 1)])
        trtllm, executor = doubles.executor, doubles.executor.executors[-1]
        found = {}
        for end_id, stop_words in ((ids[0], None), (None, [ids])):
            output = trtllm.OutputConfig(
                exclude_input_from_output=True, return_generation_logits=True
            )
            executor.enqueue_request(
                trtllm.Request(
                    input_token_ids=[1, 2, 3],
                    max_tokens=2,
                    streaming=True,
                    sampling_config=trtllm.SamplingConfig(top_k=1),
                    output_config=output,
                    end_id=end_id,
                    stop_words=stop_words,
                )
            )
            (response,) = executor.await_responses(timeout=timedelta(0))
            assert response.result.is_final
            (reason,) = response.result.finish_reasons
            tokens, logits = response.result.output_token_ids[0], response.result.generation_logits
            found[reason.name] = (tokens, logits.flatten(0, -2).shape[0])
        assert found == {"END_ID": ([], 0), "STOP_WORDS": (ids, 1)}

    def test_settings_that_pydantic_refuses_or_drops(self, doubles: Doubles) -> None:
        from tensorrt_llm.builder import BuildConfig
        from tensorrt_llm.plugin import PluginConfig

        with pytest.raises(ValueError, match="output_timing_cache: Input should be"):
            BuildConfig(output_timing_cache=None)
        with pytest.raises(ValueError, match="gemm_plugin: Input should be"):
            PluginConfig(gemm_plugin="int4")
        plugins = PluginConfig(gemm_plugins="fp8", dtype="bfloat16", nccl_plugin="auto")
        assert not hasattr(plugins, "gemm_plugins")
        assert (plugins.gemm_plugin, plugins.nccl_plugin) == (None, "bfloat16")

    def test_a_call_after_the_end(self, built: Any, doubles: Doubles) -> None:
        create_decoder_executor(EngineDir.read(built()), CUDA).close()
        executor = doubles.executor.executors[-1]
        with pytest.raises(RuntimeError, match="Shutdown called"):
            executor.await_responses(timeout=timedelta(0))
        with pytest.raises(RuntimeError, match="Shutdown called"):
            executor.cancel_request(1)

    def test_vision_calls_in_a_wrong_order_and_foreign_memory(
        self, built: Any, doubles: Doubles
    ) -> None:
        trt, stream = doubles.tensorrt, torch.cuda.current_stream().cuda_stream
        plan = (built() / "vision" / "model.engine").read_bytes()
        engine = trt.Runtime(make_logger(trt)).deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        with pytest.raises(AssertionError, match="once the input's is set"):
            context.get_tensor_shape("image_embeddings")
        with pytest.raises(AssertionError, match="has no address"):
            context.execute_async_v3(stream)
        with pytest.raises(AssertionError, match="no tensor is called"):
            context.set_tensor_address("pixels", 0)
        assert not context.set_input_shape("tiles", (57, 3, 56, 56)), "beyond the profile"
        assert context.set_input_shape("tiles", (1, 3, 56, 56))
        for name in ("tiles", "image_embeddings"):
            context.set_tensor_address(name, torch.zeros(9).data_ptr())
        with pytest.raises(AssertionError, match="another stream"):
            context.execute_async_v3(0)
        with pytest.raises(AssertionError, match="not memory of the GPU"):
            context.execute_async_v3(stream)


class TestCommands:
    """The programs as users start them."""

    @pytest.mark.parametrize(
        ("cache", "fragment"),
        [
            ("file", "Not a directory"),
            ("file/deeper/timings", "Not a directory"),
            ("/proc/nvlm/timings", "No such file or directory"),
            ("/proc", "No such file or directory"),
            ("new/" + "x" * 300, "File name too long"),
        ],
    )
    def test_a_folder_of_timings_that_cannot_be_written_is_refused_before_anything_is_compiled(
        self, workshop: Workshop, doubles: Doubles, tmp_path: Path, cache: str, fragment: str
    ) -> None:
        (tmp_path / "file").write_text("dear")
        num_builds = len(doubles.builds)
        where = ("--checkpoint_dir", checkpoint(workshop, 1), "--engine_dir", tmp_path / "engine")
        flags = ("--vision_precision", "float16", "--timing_cache", tmp_path / cache)
        fragments = (f"--timing_cache {tmp_path / cache} cannot be written", fragment)
        refused(tmp_path, BUILD, *where, *flags, fragments=fragments)
        assert len(doubles.builds) == num_builds

    @pytest.mark.parametrize("taken", ["vision.cache", "llm.cache"])
    def test_a_timing_cache_that_cannot_be_written_is_refused_before_anything_is_compiled(
        self, workshop: Workshop, doubles: Doubles, tmp_path: Path, taken: str
    ) -> None:
        (tmp_path / "timings" / taken).mkdir(parents=True)
        num_builds = len(doubles.builds)
        where = ("--checkpoint_dir", checkpoint(workshop, 1), "--engine_dir", tmp_path / "engine")
        flags = ("--vision_precision", "float16", "--timing_cache", tmp_path / "timings")
        fragments = (f"--timing_cache {tmp_path / 'timings'} cannot be written", taken)
        refused(tmp_path, BUILD, *where, *flags, fragments=fragments)
        assert len(doubles.builds) == num_builds

    def test_build_run_and_compare(
        self,
        workshop: Workshop,
        doubles: Doubles,
        reference: Runner,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        path = tmp_path / "engine"
        built = run_command(
            BUILD,
            *("--checkpoint_dir", checkpoint(workshop, 1), "--engine_dir", path),
            *("--vision_precision", "float16", "--max_num_images", 3, "--timing_cache", tmp_path),
        )
        assert built.exit_code == 0, built.stderr
        assert built.stdout == ""
        summary = json.loads((path / "vision" / "summary.json").read_text())
        assert summary["engine"] == {"gemm Half": 1}, "what the double's inspector says"
        engine_bytes = (path / "vision" / "model.engine").stat().st_size
        assert summary["engine_bytes"] == engine_bytes
        assert "1 compiled layers, 0 FP8 products" in caplog.text
        assert "1 gemm Half" in caplog.text
        assert "[TensorRT-LLM]" not in capfd.readouterr().out, "stdout belongs to answers"
        question = ("--prompt", SEVEN_TILES.text, "--image", *SEVEN_TILES.paths)
        asked = run_command(
            RUN, "--engine_dir", path, *question, "--max_new_tokens", NEW_TOKENS, "--json"
        )
        assert asked.exit_code == 0, asked.stderr
        expected = answers(reference, requests()[1:2])[0]
        assert json.loads(asked.stdout)["token_ids"] == expected
        torch_engine = workshop.engine(
            "engine_8_heads_reference",
            checkpoint(workshop, 1),
            decoder="torch",
            vision="torch",
            vision_precision="float32",
        )
        compared = run_command(
            RUN,
            *("--engine_dir", path, "--compare", torch_engine, *question),
            *("--max_new_tokens", NEW_TOKENS, "--json"),
        )
        assert compared.exit_code == 0, compared.stderr
        (difference,) = json.loads(compared.stdout)["requests"]
        assert 0 < difference["vision_error"] < FLOAT16_ONNX, "float16 against float32"
        assert 0 < difference["logit_error"] < FP8_LOGITS
        num_builds = len(doubles.builds)
        again = run_command(
            BUILD,
            *("--checkpoint_dir", checkpoint(workshop, 1), "--engine_dir", path, "--if_stale"),
            *("--vision_precision", "float16", "--max_num_images", 3),
        )
        assert again.exit_code == 0, again.stderr
        assert len(doubles.builds) == num_builds, "up to date"

    def test_an_engine_too_large_is_refused_in_one_line(
        self, workshop: Workshop, doubles: Doubles, tmp_path: Path
    ) -> None:
        result = run_command(
            BUILD,
            *("--checkpoint_dir", checkpoint(workshop, 1), "--engine_dir", tmp_path / "engine"),
            *("--memory_gb", "2", "--max_num_tokens", "100000"),
        )
        one_line_error(result, "a rank needs", "larger --tp_size")
        assert list(tmp_path.iterdir()) == []


class TestRanks:
    """`mpirun -n N run.py`: the same command line on every rank."""

    @pytest.mark.parametrize("tp_size", [2, 8])
    def test_all_ranks_work_and_the_leader_alone_talks(
        self, built: Any, doubles: Doubles, reference: Runner, tmp_path: Path, tp_size: int
    ) -> None:
        lines = [
            {"id": i, "prompt": q.text, "images": list(map(str, q.paths))}
            for i, q in enumerate(QUESTIONS)
        ]
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        answered = tmp_path / "out.jsonl"
        flags = (
            *("--engine_dir", built(tp_size), "--max_new_tokens", NEW_TOKENS),
            *("--input_file", tmp_path / "in.jsonl", "--output_file", answered),
        )
        with mpirun(doubles.executor, tp_size, command(*flags), tmp_path) as ranks:
            result = run_command(RUN, *flags)
        assert result.exit_code == 0, result.stderr
        found = [json.loads(line)["token_ids"] for line in answered.read_text().splitlines()]
        assert found == answers(reference, requests())
        assert [rank.printed for rank in ranks] == [""] * (tp_size - 1)

    def test_compare_closes_the_ranks_before_the_reference_is_loaded(
        self, built: Any, doubles: Doubles, reference: Runner, tmp_path: Path
    ) -> None:
        flags = (
            *("--engine_dir", built(2), "--compare", reference.engine.directory, "--json"),
            *("--prompt", "What?", "--max_new_tokens", NEW_TOKENS),
        )
        with mpirun(doubles.executor, 2, command(*flags), tmp_path):
            result = run_command(RUN, *flags)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["num_equal"] == 1

    def test_a_mistake_on_rank_0_ends_all_ranks(
        self, built: Any, doubles: Doubles, tmp_path: Path
    ) -> None:
        flags = ("--engine_dir", built(2), "--prompt", "x", "--image", tmp_path / "none.jpg")
        with mpirun(doubles.executor, 2, command(*flags), tmp_path) as ranks:
            result = run_command(RUN, *flags)
        one_line_error(result, "none.jpg")
        assert ranks[0].printed == ""

    def test_a_rank_that_dies_is_an_error_and_no_wait_for_ever(
        self, built: Any, doubles: Doubles, tmp_path: Path
    ) -> None:
        """It is the double's: else a worker that does nothing would pass above."""
        path = built(2)
        with (
            pytest.raises(RuntimeError, match="rank 1 has ended"),
            mpirun(doubles.executor, 2, lambda rank: None, tmp_path),
        ):
            lead(path, 2)

    def test_an_engine_does_not_open_alone(self, built: Any) -> None:
        with pytest.raises(AssertionError, match="all ranks of an engine run together"):
            lead(built(2), 2)


def command(*flags: object) -> Callable[[int], None]:
    """`run.py` with these flags on a rank of its own process."""

    def work(rank: int) -> None:
        sys.argv = ["run.py", *map(str, flags)]
        command_line.run(script(RUN).main, rank=rank)

    return work


def test_the_memory_table_says_which_gpus_hold_the_72b_model() -> None:
    from tools.memory_table import table

    fits = {}
    for row in table(8, 1, "bfloat16")[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        fits[cells[0], int(cells[1])] = cells[-1]
    assert fits["H100 80 GB", 1] == "no", "75 GB of weights leave no room"
    assert all(fits["H100 80 GB", tp] == "yes" for tp in (2, 4, 8))
    assert all(fits["H200 141 GB", tp] == "yes" for tp in (1, 2, 4, 8))


def test_the_document_holds_the_table_that_the_command_prints() -> None:
    from tools.memory_table import table

    assert "\n".join(table(8, 1, "bfloat16")) in (ROOT / "docs" / "hopper.md").read_text()
