"""Small data sets in the benchmarks' published formats, with pictures of numbers and words that the
trained small model reads, and what run.py must write for them, line by line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.asking.task_record import TaskRecord
from runtime.answers.run_record import EngineId
from tools.tiny.fonts import evaluation_font_files

READ_NUMBER, READ_WORD = "Read the number.", "Read the word."
SHORT = "\nAnswer the question using a single word or phrase."
MMMU_SUBJECTS = sorted(
    subject
    for line in (
        "Accounting Agriculture Architecture_and_Engineering Art Art_Theory Basic_Medical_Science",
        "Biology Chemistry Clinical_Medicine Computer_Science Design Economics Electronics",
        "Diagnostics_and_Laboratory_Medicine Energy_and_Power Finance Geography History",
        "Literature Manage Marketing Materials Math Mechanical_Engineering Music Pharmacy Physics",
        "Psychology Public_Health Sociology",
    )
    for subject in line.split()
)
LETTER = "Answer with the option's letter from the given choices directly."


@dataclass(frozen=True, slots=True)
class Benchmark:
    """`lines` are the expected ones by sample id, by hand. An answer of None is not expected to be
    a certain one: the small model was never asked in that way. `score` is the expected headline
    where every answer is."""

    task: str
    image_dir: Path
    gt_paths: tuple[Path, ...]
    lines: dict[Any, dict[str, Any]]
    score: float | None = None
    flags: tuple[str, ...] = ()
    truth: Path | None = None

    @property
    def run_flags(self) -> tuple[object, ...]:
        gt = ("--gt_path", *self.gt_paths) if self.gt_paths else ()
        return ("--task", self.task, "--input_image_path", self.image_dir, *gt, *self.flags)


def picture(text: str, size: tuple[int, int] = (224, 224)) -> Image.Image:
    """Dark letters on a light ground, large and upright; of one tile by default."""
    image = Image.new("RGB", size, (236, 233, 224))
    font = ImageFont.truetype(evaluation_font_files()[0], 52)
    draw = ImageDraw.Draw(image)
    draw.text((size[0] / 2, size[1] / 2), text, (28, 40, 92), font, anchor="mm")
    return image


def write_picture(path: Path, text: str, size: tuple[int, int] = (224, 224)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(text, size).save(path)


def encoded(text: str) -> dict[str, Any]:
    """As Hugging Face keeps a picture in parquet."""
    buffer = io.BytesIO()
    picture(text).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{text}.png"}


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """As pandas writes it: a value with a tab, a quote or a line break in quotes."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def prompt(question: str) -> str:
    """Megatron-LM's log of a prompt, before the assistant's turn."""
    return (
        "<|im_start|>system\nAnswer the questions.<|im_end|>\n"
        f"<|im_start|>user\n<Image><image></Image>\n{question}<|im_end|>\n"
    )


def text_vqa(folder: Path) -> Benchmark:
    """Pictures are found with .jpg added; ten people answered."""
    write_picture(folder / "images" / "4f2a.jpg", "4071")
    write_picture(folder / "images" / "77c0.jpg", "garden", (448, 224))
    data = [
        {
            "question": READ_NUMBER,
            "image_id": "4f2a",
            "image_classes": ["Sign"],
            "question_id": 34602,
            "answers": ["4071"] * 7 + ["4017", "none", "4071."],
        },
        {
            "question": READ_WORD,
            "image_id": "77c0",
            "image_classes": [],
            "question_id": 34603,
            "answers": ["garden", "the Garden", *["yard"] * 8],
        },
    ]
    gt = write_json(
        folder / "TextVQA_0.5.1_val.json",
        {"dataset_type": "val", "dataset_name": "textvqa", "data": data},
    )
    lines = {
        34602: {
            "sample_id": 34602,
            "prompt": prompt(READ_NUMBER + SHORT),
            "answer": "4071",
            "gt_answer": ["4071"] * 7 + ["4017", "none", "4071."],
        },
        34603: {
            "sample_id": 34603,
            "prompt": prompt(READ_WORD + SHORT),
            "answer": "garden",
            "gt_answer": ["garden", "the Garden", *["yard"] * 8],
        },
    }
    # Seven agree: 1. Two agree ("the Garden" is "garden" once normalised): 2 / 3.
    return Benchmark("TextVQA", folder / "images", (gt,), lines, 100 * (1 + 2 / 3) / 2)


def vqa_v2(folder: Path) -> Benchmark:
    """Questions and annotations as published, pictures named as COCO does."""
    write_picture(folder / "val2014" / "COCO_val2014_000000000042.jpg", "86")
    write_picture(folder / "val2014" / "COCO_val2014_000000262148.jpg", "window")
    questions = write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        {
            "info": {"version": "2.0"},
            "task_type": "Open-Ended",
            "data_type": "mscoco",
            "data_subtype": "val2014",
            "questions": [
                {"image_id": 42, "question": READ_NUMBER, "question_id": 42000},
                {"image_id": 262148, "question": READ_WORD, "question_id": 262148001},
            ],
        },
    )

    def people(answers: list[str]) -> list[dict[str, Any]]:
        return [
            {"answer": answer, "answer_confidence": "yes", "answer_id": number}
            for number, answer in enumerate(answers, 1)
        ]

    numbers, words = ["86"] * 9 + ["88"], ["window", *["door"] * 9]
    annotations = write_json(
        folder / "v2_mscoco_val2014_annotations.json",
        {
            "data_subtype": "val2014",
            "annotations": [
                {"question_id": 262148001, "image_id": 262148, "answers": people(words)},
                {"question_id": 42000, "image_id": 42, "answers": people(numbers)},
            ],
        },
    )
    lines = {
        42000: {
            "sample_id": 42000,
            "prompt": prompt(READ_NUMBER + SHORT),
            "answer": "86",
            "gt_answer": numbers,
        },
        262148001: {
            "sample_id": 262148001,
            "prompt": prompt(READ_WORD + SHORT),
            "answer": "window",
            "gt_answer": words,
        },
    }
    gt = (questions, annotations)
    return Benchmark("VQAv2", folder / "val2014", gt, lines, 100 * (1 + 1 / 3) / 2)


def chart_qa(folder: Path) -> Benchmark:
    """Two files, one after the other; the id is the position in both."""
    write_picture(folder / "png" / "two_col_21.png", "105")
    write_picture(folder / "png" / "multi_col_7.png", "7310")
    human = write_json(
        folder / "test_human.json",
        [{"imgname": "two_col_21.png", "query": READ_NUMBER, "label": "103"}],
    )
    augmented = write_json(
        folder / "test_augmented.json",
        [{"imgname": "multi_col_7.png", "query": READ_NUMBER, "label": "8100"}],
    )
    lines = {
        0: {
            "sample_id": 0,
            "prompt": prompt(READ_NUMBER + SHORT),
            "answer": "105",
            "gt_answer": ["103"],
        },
        1: {
            "sample_id": 1,
            "prompt": prompt(READ_NUMBER + SHORT),
            "answer": "7310",
            "gt_answer": ["8100"],
        },
    }
    # 105 is within 5 % of 103, 7310 is not of 8100.
    return Benchmark("ChartQA", folder / "png", (human, augmented), lines, 50.0)


def doc_vqa(folder: Path) -> Benchmark:
    write_picture(folder / "documents" / "xnbl0037_1.png", "marble")
    gt = write_json(
        folder / "val_v1.0_withQT.json",
        {
            "dataset_name": "SP-DocVQA",
            "dataset_split": "val",
            "data": [
                {
                    "questionId": 49153,
                    "question": READ_WORD,
                    "question_types": ["form"],
                    "image": "documents/xnbl0037_1.png",
                    "docId": 14465,
                    "ucsf_document_id": "xnbl0037",
                    "ucsf_document_page_no": "1",
                    "answers": ["Marbles", "stone"],
                    "data_split": "val",
                }
            ],
        },
    )
    lines = {
        49153: {
            "sample_id": 49153,
            "prompt": prompt(READ_WORD + SHORT),
            "answer": "marble",
            "gt_answer": ["Marbles", "stone"],
        }
    }
    # One of seven characters is missing.
    return Benchmark("SPDocVQA", folder, (gt,), lines, 100 * 6 / 7)


def info_vqa(folder: Path) -> Benchmark:
    write_picture(folder / "infographics" / "38477.jpeg", "2019")
    gt = write_json(
        folder / "infographicsVQA_val_v1.0_withQT.json",
        {
            "dataset_name": "infographicVQA",
            "data": [
                {
                    "questionId": 98313,
                    "question": READ_NUMBER,
                    "image_local_name": "38477.jpeg",
                    "image_url": "https://example.org/38477.jpeg",
                    "ocr_output_file": "38477.json",
                    "answers": ["2019"],
                    "data_split": "val",
                }
            ],
        },
    )
    lines = {
        98313: {
            "sample_id": 98313,
            "prompt": prompt(READ_NUMBER + SHORT),
            "answer": "2019",
            "gt_answer": ["2019"],
        }
    }
    return Benchmark("InfoVQA", folder / "infographics", (gt,), lines, 100.0)


def captioning(folder: Path) -> Benchmark:
    write_picture(folder / "val2014" / "COCO_val2014_000000000074.jpg", "74")
    write_picture(folder / "val2014" / "133.jpg", "dog")
    gt = write_json(
        folder / "captions_val2014.json",
        {
            "images": [{"id": 74, "file_name": "COCO_val2014_000000000074.jpg"}, {"id": 133}],
            "annotations": [
                {"image_id": 74, "id": 1, "caption": "The number 74 on a sign."},
                {"image_id": 133, "id": 2, "caption": "A word about an animal"},
                {"image_id": 74, "id": 3, "caption": "A sign with a number"},
            ],
        },
    )
    question = "Provide a one-sentence caption for provided image."
    lines = {
        74: {
            "sample_id": 74,
            "prompt": prompt(question),
            "caption": None,
            "ground_truth": ["The number 74 on a sign.", "A sign with a number"],
        },
        133: {
            "sample_id": 133,
            "prompt": prompt(question),
            "caption": None,
            "ground_truth": ["A word about an animal"],
        },
    }
    return Benchmark("captioning", folder / "val2014", (gt,), lines)


def ocrbench(folder: Path) -> Benchmark:
    for name, text in (("a", "30578"), ("b", "Copper"), ("c", "9")):
        write_picture(folder / "OCRBench_Images" / "IIIT5K" / f"{name}.png", text)
    gt = write_json(
        folder / "OCRBench.json",
        [
            {
                "dataset_name": "IIIT5K",
                "image_path": "IIIT5K/a.png",
                "question": READ_NUMBER,
                "answers": "30578",
                "type": "Digit String Recognition",
            },
            {
                "dataset_name": "FUNSD",
                "image_path": "IIIT5K/b.png",
                "question": READ_WORD,
                "answers": ["copper", "Silver"],
                "type": "Key Information Extraction",
            },
            {
                "dataset_name": "HME100k",
                "image_path": "IIIT5K/c.png",
                "question": READ_NUMBER,
                "answers": ["\\frac 1 2"],
                "type": "Handwritten Mathematical Expression Recognition",
            },
        ],
    )
    lines = {
        0: {
            "sample_id": 0,
            "prompt": prompt(READ_NUMBER),
            "answer": "30578",
            "gt_answer": ["30578"],
            "dataset_name": "IIIT5K",
            "data_type": "Digit String Recognition",
        },
        1: {
            "sample_id": 1,
            "prompt": prompt(READ_WORD),
            "answer": "Copper",
            "gt_answer": ["copper", "Silver"],
            "dataset_name": "FUNSD",
            "data_type": "Key Information Extraction",
        },
        2: {
            "sample_id": 2,
            "prompt": prompt(READ_NUMBER),
            "answer": "9",
            "gt_answer": ["\\frac 1 2"],
            "dataset_name": "HME100k",
            "data_type": "Handwritten Mathematical Expression Recognition",
        },
    }
    return Benchmark("OCRBench", folder / "OCRBench_Images", (gt,), lines, 2)


def ai2d(folder: Path) -> Benchmark:
    """The image's folder in the record, and not on disk: its last part counts then."""
    write_picture(folder / "AI2D_TEST" / "4.png", "rabbit")
    gt = folder / "test_vlmevalkit.jsonl"
    record = {
        "image": "ai2diagram/AI2D_TEST/4.png",
        "question": READ_WORD,
        "question_id": 4,
        "answer": "Rabbit",
    }
    gt.write_text(json.dumps(record) + "\n")
    lines = {
        4: {
            "sample_id": 4,
            "prompt": prompt(READ_WORD),
            "answer": "rabbit",
            "gt_answer": ["Rabbit"],
        }
    }
    return Benchmark("AI2D", folder / "AI2D_TEST", (gt,), lines, 100.0)


def realworld_qa(folder: Path) -> Benchmark:
    write_picture(folder / "images" / "0.webp", "51")
    write_picture(folder / "images" / "12.webp", "left")
    gt = write_json(
        folder / "annotations.json",
        [
            {
                "image": "0.webp",
                "question": READ_NUMBER,
                "question_type": "open",
                "answer": "51",
            },
            {
                "image": "12.webp",
                "question": "Which way is the arrow pointing?",
                "question_type": "multi-choice",
                "choices": ["Right", "Left"],
                "correct_choice_index": 1,
            },
        ],
    )
    lines = {
        0: {
            "sample_id": 0,
            "prompt": prompt(READ_NUMBER + SHORT),
            "answer": "51",
            "gt_answer": ["51"],
        },
        12: {
            "sample_id": 12,
            "prompt": prompt(f"Which way is the arrow pointing?\nA. Right\nB. Left\n{LETTER}"),
            "answer": None,
            "gt_answer": ["B"],
        },
    }
    return Benchmark("RealworldQA", folder / "images", (gt,), lines)


def math_vista(folder: Path) -> Benchmark:
    """Parquet as on the Hub; two row groups, so that pictures come from both."""
    import pyarrow
    import pyarrow.parquet

    rows = [
        {
            "pid": "1",
            "question": "What is it?",
            "image": "images/1.jpg",
            "decoded_image": encoded("12.50"),
            "choices": None,
            "unit": None,
            "precision": 2.0,
            "answer": "12.5",
            "question_type": "free_form",
            "answer_type": "float",
            "query": "Hint: " + READ_NUMBER,
        },
        {
            "pid": "2",
            "question": "How large is the angle?",
            "image": "images/2.jpg",
            "decoded_image": encoded("30"),
            "choices": ["60", "30", "90"],
            "unit": None,
            "precision": None,
            "answer": "30",
            "question_type": "multi_choice",
            "answer_type": "text",
            "query": "Hint: not used",
        },
        {
            "pid": "3",
            "question": "What is it?",
            "image": "images/3.jpg",
            "decoded_image": encoded("640"),
            "choices": None,
            "unit": None,
            "precision": None,
            "answer": "640",
            "question_type": "free_form",
            "answer_type": "integer",
            "query": "Hint: " + READ_NUMBER,
        },
    ]
    (folder / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(rows),
        folder / "data" / "testmini-00000-of-00001-725687bf7a18d64b.parquet",
        row_group_size=2,
    )
    angle = f"How large is the angle?\nA. 60\nB. 30\nC. 90\n{LETTER}"
    free = {"question_type": "free_form", "index2ans": {}, "all_choices": []}
    lines = {
        "1": {
            "sample_id": "1",
            "prompt": prompt(READ_NUMBER),
            "answer": None,
            "gt_answer": ["12.5"],
            **free,
        },
        "2": {
            "sample_id": "2",
            "prompt": prompt(angle),
            "answer": None,
            "gt_answer": ["B"],
            "question_type": "multi_choice",
            "index2ans": {"A": "60", "B": "30", "C": "90"},
            "all_choices": ["A", "B", "C"],
        },
        "3": {
            "sample_id": "3",
            "prompt": prompt(READ_NUMBER),
            "answer": "640",
            "gt_answer": ["640"],
            **free,
        },
    }
    return Benchmark("MathVista", folder, (), lines)


def mmmu(folder: Path) -> Benchmark:
    """A folder of parquet a subject, most without a row; only the first picture is asked about."""
    import pyarrow
    import pyarrow.parquet

    def row(subject: str, number: int, **values: Any) -> dict[str, Any]:
        images = {f"image_{k}": None for k in range(1, 8)}
        return {
            "id": f"validation_{subject}_{number}",
            "explanation": "",
            "topic_difficulty": "Easy",
            "img_type": "['Tables']",
            **images,
            **values,
        }

    art = row(
        "Art_Theory",
        1,
        question="<image 1> Which of them? <image 2>",
        options='[\'a "dome"\', "it\'s <image 3>"]',
        answer="B",
        question_type="multiple-choice",
        subfield="Art History",
        image_1=encoded("dome"),
        image_2=encoded("other"),
    )
    physics = row(
        "Physics",
        20,
        question="<image 1>" + READ_NUMBER,
        options="[]",
        answer="['392', '392 N']",
        question_type="open",
        subfield="Mechanics",
        image_1=encoded("392"),
    )
    pictures = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [(name, pictures if name.startswith("image_") else pyarrow.string()) for name in art]
    for subject in MMMU_SUBJECTS:
        rows = {"Art_Theory": [art], "Physics": [physics]}.get(subject, [])
        (folder / subject).mkdir(parents=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows, schema=pyarrow.schema(fields)),
            folder / subject / "validation-00000-of-00001.parquet",
        )
    lines = {
        "validation_Art_Theory_1": {
            "sample_id": "validation_Art_Theory_1",
            # Of the reference's three pictures, one is shown, and no mark is left in the text.
            "prompt": prompt(f' Which of them? \n(A) a "dome"\n(B) it\'s \n\n{LETTER}'),
            "text": None,
            "prediction": None,
            "question_type": "multiple-choice",
            "field": "art theory",
            "subfield": "Art History",
            "index2ans": {"A": 'a "dome"', "B": "it's <image 3>"},
            "all_choices": ["A", "B"],
        },
        "validation_Physics_20": {
            "sample_id": "validation_Physics_20",
            "prompt": prompt(READ_NUMBER + SHORT),
            "text": "392",
            "prediction": "392",
            "question_type": "open",
            "field": "physics",
            "subfield": "Mechanics",
        },
    }
    truth = write_json(
        folder / "answer_dict_val.json",
        {
            "validation_Art_Theory_1": {"question_type": "multiple-choice", "ground_truth": "B"},
            "validation_Physics_20": {
                "question_type": "short-answer",
                "ground_truth": ["392", "392 N"],
            },
        },
    )
    return Benchmark("MMMU", folder, (), lines, truth=truth)


def video_mme(folder: Path) -> Benchmark:
    """A video of 24 frames; two questions about it."""
    write_video(folder / "videos" / "fFjv93ACGo8.mp4", [str(i) for i in range(24)])
    video = {
        "video_id": "001",
        "duration_category": "short",
        "video_category": "Knowledge",
        "video_subcategory": "Humanity & History",
        "url": "https://www.youtube.com/watch?v=fFjv93ACGo8",
    }
    questions = [
        {
            "question_id": f"001-{number}",
            "task_type": "Counting Problem",
            "question": f"Question {number}?",
            "choices": ["A. one.", "B. two.", "C. three.", "D. four."],
            "answer": answer,
        }
        for number, answer in ((1, "A"), (2, "D"))
    ]
    gt = write_json(folder / "video_mme.json", [{**video, "questions": questions}])
    lines = {
        question["question_id"]: {**video, "questions": [{**question, "response": None}]}
        for question in questions
    }
    return Benchmark("VideoMME", folder / "videos", (gt,), lines, flags=("--num_frames", "3"))


def write_video(path: Path, texts: list[str]) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 224
        stream.pix_fmt = "yuv420p"
        for text in texts:
            frame = av.VideoFrame.from_ndarray(np.asarray(picture(text)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def custom(folder: Path) -> Benchmark:
    """Questions of one's own: asked as they are, several answers, a text without a picture."""
    write_picture(folder / "photos" / "51.png", "51")
    gt = folder / "mine.jsonl"
    records = [
        {"id": 7, "question": READ_NUMBER, "image": "51.png", "answers": ["fifty-one", " 51"]},
        {"question": "What is 1 plus 1?", "answer": "3"},
    ]
    gt.write_text("".join(json.dumps(record) + "\n" for record in records))
    without_picture = prompt("What is 1 plus 1?").replace("<Image><image></Image>\n", "")
    lines = {
        7: {
            "sample_id": 7,
            "prompt": prompt(READ_NUMBER),
            "answer": "51",
            "gt_answer": ["fifty-one", " 51"],
        },
        2: {
            "sample_id": 2,
            "prompt": without_picture,
            "answer": "2",
            "gt_answer": ["3"],
        },
    }
    return Benchmark("custom", folder / "photos", (gt,), lines, 50.0)


MAKERS: dict[str, Callable[[Path], Benchmark]] = {
    "captioning": captioning,
    "TextVQA": text_vqa,
    "VQAv2": vqa_v2,
    "ChartQA": chart_qa,
    "SPDocVQA": doc_vqa,
    "InfoVQA": info_vqa,
    "MMMU": mmmu,
    "MathVista": math_vista,
    "OCRBench": ocrbench,
    "AI2D": ai2d,
    "RealworldQA": realworld_qa,
    "VideoMME": video_mme,
    "custom": custom,
}


def write_answers(
    prefix: Path, task: str, lines: list[dict[str, Any] | str], partition: int = 0
) -> Path:
    """A file of answers as run.py and Megatron-LM name it; strings are lines as they are."""
    path = Path(f"{prefix}-{task}-dprank=0-partition={partition}.jsonl")
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def short(sample_id: int | str, answer: str, *truths: str) -> dict[str, Any]:
    """A line of a task with short answers."""
    return {"sample_id": sample_id, "prompt": "", "answer": answer, "gt_answer": list(truths)}


def run_record(task: str, engine: str = "1", **settings: Any) -> TaskRecord:
    """A record of one sample, with these settings beside the usual ones."""
    usual = {
        "quant_algo": None,
        "kv_cache_quant_algo": None,
        "dtype": "bfloat16",
        "decoder": "torch",
        "vision": "torch bfloat16",
        "image_size": 448,
        "max_num_tiles": 6,
        "system": "Answer the questions.",
        "prompt_format": "megatron",
        "max_new_tokens": 128,
    }
    data = {"gt_path": ["x.jsonl"], "num_frames": 8, "input_image_path": "x", "split": None}
    return TaskRecord(EngineId(engine), {**usual, **settings}, task, data, 0, 1, 1)
