"""Hugging Face folders: `config.json` beside safetensors, read offline by transformers.

The class is the one that the configuration names. Code in a folder is never run, the
network is never asked, and weights that the file lacks are an error: the library
would fill them with random numbers and warn.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from patchclamp.core.errors import MissingExtraError, SourceError, UnsafeFileError
from patchclamp.core.findings import Json
from patchclamp.model.sources import safetensors_file
from patchclamp.model.sources.catalogue import read_config
from patchclamp.model.sources.image_processor import read_preprocessing
from patchclamp.model.sources.loaded import Loaded, Task
from patchclamp.model.tokens import TransformersTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INSTALL = "pip install 'patchclamp[hf]'"
EXAMPLE_LENGTH = 8
"""Tokens in a row of example inputs."""

HEADS = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForSequenceClassification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModelForQuestionAnswering", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES"),
    ("AutoModelForMultipleChoice", "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES"),
    ("AutoModelForNextSentencePrediction", "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES"),
    ("AutoModelForPreTraining", "MODEL_FOR_PRETRAINING_MAPPING_NAMES"),
    ("AutoModelForAudioClassification", "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES"),
    ("AutoModel", "MODEL_MAPPING_NAMES"),
)
"""Auto classes of transformers and the tables of the classes that each may build."""

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_folder(
    folder: Path, *, name: str, origin: str = "Hugging Face folder", allow_pickle: bool
) -> Loaded:
    """Open a folder with `config.json`.

    Raises:
        SourceError: the configuration or weights are missing, damaged, of an unknown
            architecture, or need code from the folder.
        UnsafeFileError: the weights are a pickle, and `allow_pickle` is not set.
        MissingExtraError: transformers is not installed.
    """
    require("transformers")
    config = read_config(folder)
    safe = _check_weights(folder, allow_pickle=allow_pickle)
    auto, notes = _auto_class(config, folder)
    with quiet():
        module, unused = _read(folder, auto, safe=safe)
        tokenizer = read_tokenizer(folder)
    if unused:
        notes += (f"{len(unused)} tensors of the file are not used: {_some(unused)}",)
    if not safe:
        notes += ("weights read from a pickle by the restricted reader of torch",)
    return describe(
        module, name=name, origin=origin, folder=folder, tokenizer=tokenizer, notes=notes
    )


def describe(
    module: PreTrainedModel,
    *,
    name: str,
    origin: str,
    folder: Path | None = None,
    tokenizer: TransformersTokenizer | None = None,
    notes: tuple[str, ...] = (),
) -> Loaded:
    """What a transformers module says of itself. The module is only looked at."""
    task = _task(module)
    preprocessing, doubts = None, tuple[str, ...]()
    if folder is not None and module.main_input_name == "pixel_values":
        preprocessing, doubts = read_preprocessing(folder)
    context = getattr(_text_config(module), "max_position_embeddings", None)
    labels = getattr(module.config, "id2label", None) or {}
    classifies = type(module).__name__.endswith("Classification")
    return Loaded(
        module=module,
        name=name,
        origin=origin,
        example_inputs=_examples(module, task),
        tokenizer=tokenizer,
        task=task,
        call_options=_call_options(module),
        class_names=tuple(str(labels[i]) for i in sorted(labels)) if classifies else (),
        preprocessing=preprocessing,
        context=context if isinstance(context, int) and context > 0 else None,
        notes=(*notes, *doubts),
    )


def require(*modules: str, install: str = INSTALL) -> None:
    """Raise MissingExtraError unless all of these can be imported."""
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise MissingExtraError(
            f"this model needs packages that are not installed: {', '.join(missing)}", hint=install
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the library's bars and log; both as found afterwards."""
    # as attributes of modules, because these libraries declare neither exports nor types
    logging = import_module("transformers.utils.logging")
    hub_bars = import_module("huggingface_hub.utils.tqdm")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    hub_bars_off = hub_bars.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        if hub_bars_off:
            hub_bars.disable_progress_bars()


def read_tokenizer(folder: Path) -> TransformersTokenizer | None:
    """The tokenizer of a folder; None if it has none."""
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return TransformersTokenizer(
            AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        )
    except Exception as e:  # the Rust tokenizer raises bare Exception for a damaged file
        raise SourceError(f"the tokenizer in '{folder}' cannot be read: {first_line(e)}") from e


def check_complete(
    module: PreTrainedModel, info: Mapping[str, object], where: Path
) -> tuple[str, ...]:
    """Refuse weights that were missing or did not fit; returns the names of unused ones."""
    lacking = sorted(str(n) for n in info.get("missing_keys") or ())  # type: ignore[attr-defined]
    misfit = sorted(str(n) for n in info.get("mismatched_keys") or ())  # type: ignore[attr-defined]
    errors = [str(n) for n in info.get("error_msgs") or ()]  # type: ignore[attr-defined]
    if lacking or misfit or errors:
        wrong = [*(f"'{n}' is missing" for n in lacking), *(f"{n} misfits" for n in misfit)]
        raise SourceError(
            f"the weights in '{where}' do not fill a {type(module).__name__}: "
            f"{_some([*wrong, *errors])}",
            hint="the file belongs to another architecture, or is incomplete",
        )
    return tuple(sorted(str(n) for n in info.get("unexpected_keys") or ()))  # type: ignore[attr-defined]


def first_line(e: BaseException) -> str:
    """The first line of a message, without the full stop that an error adds."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0].rstrip(".")


def _check_weights(folder: Path, *, allow_pickle: bool) -> bool:
    """Whether the weights are safetensors; a pickle is refused unless allowed."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        safetensors_file.check(folder / "model.safetensors")
        return True
    if index.is_file():
        for shard in _shards(index):
            safetensors_file.check(folder / shard)
        return True
    pickles = sorted(p.name for p in folder.glob("pytorch_model*.bin"))
    if not pickles:
        raise SourceError(
            f"folder '{folder}' has a config.json but no weights", expected="model.safetensors"
        )
    if not allow_pickle:
        raise UnsafeFileError(
            f"the weights in '{folder}' are a pickle ({pickles[0]}), "
            "and reading a pickle can run any code that is in it",
            expected="model.safetensors",
            hint="convert them; or, if you trust who made it, allow_pickle=True (--allow-pickle)",
        )
    return False


def _shards(index: Path) -> list[str]:
    import json

    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        raise SourceError(f"'{index}' is no index of weights: {e!r}") from e
    outside = [n for n in names if Path(str(n)).name != n]
    if outside:
        raise SourceError(f"'{index}' names a file outside its folder", got=repr(outside[0]))
    return names


def _auto_class(config: Mapping[str, object], folder: Path) -> tuple[str, tuple[str, ...]]:
    """The auto class that builds what the configuration names, with notes."""
    modeling_auto = import_module("transformers.models.auto.modeling_auto")
    known = import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING_NAMES
    kind = config.get("model_type")
    if kind not in known:
        if "auto_map" in config:
            raise SourceError(
                f"'{folder}' needs Python code that it brings along, which is never run",
                got=f"model_type {kind!r} with an auto_map",
                hint="import that code yourself, build the module, and open the module",
            )
        raise SourceError(
            f"the installed transformers does not know the architecture of '{folder}'",
            got=f"model_type {kind!r}",
            expected="a model_type of transformers",
        )
    listed = config.get("architectures")
    named = listed[0] if isinstance(listed, list) and listed else None
    if named is None:
        return "AutoModel", ("its config.json names no architecture, so it opens without a head",)
    for auto, table in HEADS:
        built = getattr(modeling_auto, table, {}).get(kind)
        if named == built or (isinstance(built, (tuple, list)) and named in built):
            return auto, ()
    raise SourceError(
        f"the installed transformers does not build the architecture of '{folder}'",
        got=f"{named!r} of model_type {kind!r}",
        hint="build the module yourself and open the module",
    )


def _read(folder: Path, auto: str, *, safe: bool) -> tuple[PreTrainedModel, tuple[str, ...]]:
    import transformers

    try:
        module, info = getattr(transformers, auto).from_pretrained(
            folder,
            dtype="auto",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=safe,
            output_loading_info=True,
        )
    except Exception as e:  # the library checks little and raises whatever it meets
        raise SourceError(f"'{folder}' cannot be opened: {first_line(e)}") from e
    return module.eval(), check_complete(module, info, folder)


def _task(module: PreTrainedModel) -> Task:
    name = type(module).__name__
    if name.endswith(("ForCausalLM", "LMHeadModel")):
        return Task.LANGUAGE
    if name.endswith("ForImageClassification"):
        return Task.CLASSIFY_IMAGES
    is_headless = name.endswith("Model") or name.endswith("ForMaskedLM")
    return Task.ENCODE_TEXT if is_headless and module.main_input_name == "input_ids" else Task.OTHER


def _call_options(module: PreTrainedModel) -> dict[str, Json]:
    """A decoder fills its key-value cache unless it is told not to; a plain pass needs none."""
    caches = "use_cache" in inspect.signature(module.forward).parameters
    is_encoder = getattr(module.config, "is_decoder", None) is False
    return {"use_cache": False} if caches and not is_encoder else {}


def _text_config(module: PreTrainedModel) -> object:
    return module.config.get_text_config()


def _examples(module: PreTrainedModel, task: Task) -> dict[str, torch.Tensor] | None:
    """Random inputs of the usual form: ids, ids with mask for encoders, or images."""
    generator = torch.Generator().manual_seed(0)
    if module.main_input_name == "pixel_values":
        side, channels = (getattr(module.config, k, None) for k in ("image_size", "num_channels"))
        sides = (side, side) if isinstance(side, int) else side
        if not isinstance(channels, int) or not isinstance(sides, (tuple, list)):
            return None
        return {"pixel_values": torch.randn(2, channels, *sides, generator=generator)}
    vocab = getattr(_text_config(module), "vocab_size", None)
    if module.main_input_name != "input_ids" or not isinstance(vocab, int):
        return None
    ids = torch.randint(vocab, (2, EXAMPLE_LENGTH), generator=generator)
    if task is Task.LANGUAGE:
        return {"input_ids": ids}
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(module.config, "is_encoder_decoder", False):
        made["decoder_input_ids"] = ids.clone()
    return made


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more
