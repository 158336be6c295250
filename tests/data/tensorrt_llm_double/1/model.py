"""A double of TensorRT-LLM's C++ Triton backend: its tensors, our decoder.

Checks every tensor it is given as strictly as the real one must be served, and streams output_ids
and sequence_length as that does: new tokens only, the end token left out, an empty last response.
"""

import json
import threading
import time
from pathlib import Path

import numpy as np
import torch
import triton_python_backend_utils as pb_utils

from nvlm.inputs.tokenizer import Tokenizer
from nvlm.model.dtypes import TORCH_DTYPES
from runtime.decoder.executor import DecoderRequest, create_decoder_executor
from runtime.decoder.guidance import Guidance
from runtime.engine.engine_dir import EngineDir
from runtime.requests.guide import Guide
from runtime.requests.sampling import SamplingParams

NUMPY = {
    "TYPE_INT32": np.int32,
    "TYPE_FP32": np.float32,
    "TYPE_UINT64": np.uint64,
    "TYPE_BOOL": np.bool_,
    "TYPE_STRING": np.object_,
}
CANCELLATION_CHECK_PERIOD_S = 0.05
REFUSED_TEMPERATURE = 99.0  # an error on demand
REQUIRED = {"input_ids", "input_lengths", "request_output_len", "end_id", "pad_id", "streaming"}
SAMPLING = {"runtime_top_k", "runtime_top_p", "temperature", "seed"}
PENALTIES = {"repetition_penalty", "presence_penalty", "frequency_penalty", "min_tokens"}
WORDS = {"bad_words_list", "embedding_bias", "return_log_probs"}
GUIDE = {"guided_decoding_guide_type", "guided_decoding_guide"}
TABLE = {"prompt_embedding_table", "prompt_vocab_size", "prompt_table_extra_ids"}


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        self._types = {spec["name"]: spec["data_type"] for spec in config["input"]}
        torch.set_num_threads(1)
        llm_dir = Path(config["parameters"]["gpt_model_path"]["string_value"])
        engine = EngineDir.read(llm_dir.parent)
        self._decoder_config = engine.checkpoint_config.decoder
        self._dtype = TORCH_DTYPES[engine.checkpoint_config.dtype]
        self._guidance = self._read_tokenizer_info(config["parameters"], engine)
        self._executor = create_decoder_executor(engine, torch.device("cpu"))
        self._senders = {}  # by the executor's request id
        self._next_check = 0.0
        self._condition = threading.Condition()
        self._is_closing = False
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()

    def _read_tokenizer_info(self, parameters, engine):
        """The double of xgrammar reads the engine's own tokenizer, once the file agrees with it."""
        assert parameters["guided_decoding_backend"]["string_value"] == "xgrammar"
        path = parameters["xgrammar_tokenizer_info_path"]["string_value"]
        info = json.loads(Path(path).read_text("utf-8"))
        assert info.keys() == {"encoded_vocab", "tokenizer_str", "stop_token_ids"}
        tokenizer = Tokenizer(engine.directory / "tokenizer")
        assert len(info["encoded_vocab"]) == tokenizer.num_tokens
        assert [info["encoded_vocab"][i] for i in info["stop_token_ids"]] == ["<|im_end|>"]
        return Guidance(tokenizer, self._decoder_config.vocab_size)

    def finalize(self):
        with self._condition:
            self._is_closing = True
            self._condition.notify()
        self._thread.join()

    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            try:
                with self._condition:
                    self._accept(request, sender)
                    self._condition.notify()
            except AssertionError as error:
                self._send(sender, error=pb_utils.TritonError(f"the double refuses: {error}"))

    def _accept(self, request, sender):
        tensors = {tensor.name(): tensor for tensor in request.inputs()}
        arrays = self._checked(tensors)
        sampling = {k: arrays[k].item() for k in SAMPLING & arrays.keys()}
        assert sampling.get("temperature") != REFUSED_TEMPERATURE, "the temperature"
        greedy = sampling["runtime_top_k"] == 1
        end_id = arrays["end_id"].item()
        guide = self._guide(arrays)
        others = {k: arrays[k].item() for k in PENALTIES & arrays.keys()}
        if "embedding_bias" in arrays:
            bias = arrays["embedding_bias"][0]
            assert len(bias) == self._decoder_config.vocab_size
            others["logit_bias"] = {int(i): float(bias[i]) for i in bias.nonzero()[0]}
        others["logprobs"] = "return_log_probs" in arrays
        request_id = self._executor.submit(
            DecoderRequest(
                arrays["input_ids"][0].tolist(),
                arrays["request_output_len"].item(),
                arrays.get("prompt_embedding_table"),
                stop_ids=frozenset({end_id} if end_id >= 0 else ()),
                sampling=SamplingParams(**others)
                if greedy
                else SamplingParams(
                    sampling["temperature"],
                    sampling["runtime_top_k"],
                    sampling["runtime_top_p"],
                    sampling["seed"],
                    **others,
                ),
                bad_words=_words(arrays),
                guide=guide,
                compiled_guide=guide and self._guidance.compile(guide),
            )
        )
        self._senders[request_id] = sender

    def _guide(self, arrays):
        """By the names that the backend knows: it takes JSON lists and Lark for none of them."""
        if "guided_decoding_guide_type" not in arrays:
            return None
        kind, text = (arrays[name].item().decode() for name in sorted(GUIDE, reverse=True))
        assert kind in ("json_schema", "regex"), f"the guide type {kind}"
        return Guide(kind, text)

    def _checked(self, tensors):
        names = set(tensors)
        assert names >= REQUIRED, f"{REQUIRED - names} is missing"
        known = REQUIRED | SAMPLING | PENALTIES | WORDS | GUIDE | TABLE
        assert names <= known, f"{names - known}"
        assert not names & TABLE or names >= TABLE, "half a prompt table"
        arrays = {}
        for name, tensor in tensors.items():
            if name == "prompt_embedding_table":
                table = torch.from_dlpack(tensor.to_dlpack()).clone()
                assert table.dtype == self._dtype, f"the table is {table.dtype}"
                arrays[name] = table[0]
                continue
            array = tensor.as_numpy()
            assert array.dtype == NUMPY[self._types[name]], f"{name} is {array.dtype}"
            assert array.ndim == 2 + (name == "bad_words_list"), f"{name} is {array.shape}"
            assert len(array) == 1, f"{name} is {array.shape}"
            arrays[name] = array
        ids = arrays["input_ids"][0]
        assert arrays["input_lengths"].item() == len(ids), "input_lengths"
        assert arrays["streaming"].item() is True, "streaming"
        vocab_size = self._decoder_config.vocab_size
        num_rows = 0
        if "prompt_vocab_size" in arrays:
            num_rows = arrays["prompt_vocab_size"].item()
            table = arrays["prompt_embedding_table"]
            assert table.shape == (num_rows, self._decoder_config.hidden_size), "table shape"
            extra = arrays["prompt_table_extra_ids"][0]
            assert ((extra > 0) == (ids >= vocab_size)).all(), "extra ids"
        assert sorted(ids[ids >= vocab_size]) == list(range(vocab_size, vocab_size + num_rows))
        return arrays

    def _loop(self):
        while True:
            time.sleep(0.0005)  # locks are unfair: lets new requests in between two steps
            with self._condition:
                self._condition.wait_for(lambda: self._senders or self._is_closing)
                if self._is_closing:
                    return
                self._drop_cancelled()
                for output in self._executor.step():
                    sender = self._senders[output.request_id]
                    if output.token_id is not None:
                        ids = np.array([[[output.token_id]]], np.int32)
                        tensors = [
                            pb_utils.Tensor("output_ids", ids),
                            pb_utils.Tensor("sequence_length", np.ones((1, 1), np.int32)),
                        ]
                        if output.logprobs is not None:
                            listed = np.array([[[output.logprobs.logprob]]], np.float32)
                            tensors.append(pb_utils.Tensor("output_log_probs", listed))
                        sender.send(pb_utils.InferenceResponse(tensors))
                    if output.finish_reason is not None:
                        del self._senders[output.request_id]
                        self._send(sender)

    def _drop_cancelled(self):
        """As the backend's parameter cancellation_check_period_ms has it."""
        if (now := time.monotonic()) < self._next_check:
            return
        self._next_check = now + CANCELLATION_CHECK_PERIOD_S
        for request_id, sender in list(self._senders.items()):
            if sender.is_cancelled():
                self._executor.cancel(request_id)
                del self._senders[request_id]
                self._send(sender)

    def _send(self, sender, error=None):
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if error is None:
            sender.send(flags=final)
        else:
            sender.send(pb_utils.InferenceResponse(error=error), flags=final)


def _words(arrays):
    """[1, 2, n]: ids one after the other, and where each word ends."""
    if "bad_words_list" not in arrays:
        return ()
    ids, ends = arrays["bad_words_list"][0].tolist()
    ends = [end for end in ends if end >= 0]
    assert ends[-1] == len(ids), "the last word ends with the ids"
    return tuple(tuple(ids[a:b]) for a, b in zip([0, *ends], ends, strict=False))
