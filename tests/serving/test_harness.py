"""lm-evaluation-harness asks a server of ours, and tells what the model itself says."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from moe_router.models import Sampling, generate
from tests.serving.test_chat import tokenizer_in
from tests.serving.web import served
from tests.serving.work import byte_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install .[harness]"
    ),
]
QUESTIONS = [
    {"context": "The first", "choices": [" one", " to come", " x"], "answer": 1},
    {"context": "A longer question, in words", "choices": [" yes", " no", " yo"], "answer": 0},
    {"context": "so", "choices": [" it goes", " be it", " what"], "answer": 2},
]
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: ""
metric_list: [{metric: acc}]
""",
    "tiny_text": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, temperature: 0}
metric_list: [{metric: exact_match}]
""",
    "tiny_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{context}}"
metric_list: [{metric: byte_perplexity}]
""",
}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The harness's own record of each task's samples, the model, and its tokenizer."""
    folder = tmp_path_factory.mktemp("harness")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    tokenizer = tokenizer_in(folder / "tokenizer", **settings)
    model = byte_model(vocab=tokenizer.vocab, std=4.0)
    write_tasks(folder)
    with served(model=model, tokenizer=tokenizer) as (port, _):
        evaluate(folder, f"http://127.0.0.1:{port}/v1/completions")
    records = {}
    for name in TASKS:
        (file,) = (folder / "out").glob(f"**/samples_{name}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        records[name] = sorted(samples, key=lambda sample: sample["doc_id"])
    return records, model, tokenizer


def write_tasks(folder):
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\n"
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{data}test_split: test\n{text}")


def evaluate(folder, url):
    server = f"model=tiny,base_url={url},num_concurrent=2,tokenizer={folder}/tokenizer"
    backend = "tokenizer_backend=huggingface"
    options = {
        "--model": "local-completions",
        "--model_args": f"{server},{backend}",
        "--batch_size": "2",
        "--tasks": ",".join(TASKS),
        "--include_path": str(folder),
        "--output_path": str(folder / "out"),
    }
    words = [word for option in options.items() for word in option]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words, "--log_samples"],
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def score(model, ids, begin):
    """Log-probability of ids[begin:] after those before, and whether each was the likeliest."""
    offsets_B1 = torch.tensor([0, len(ids)], dtype=torch.int32)
    with torch.no_grad():
        logits_TV = model(torch.tensor(ids), torch.arange(len(ids)).int(), offsets_B1).logits_TV
    table_TV = logits_TV.log_softmax(-1)[begin - 1 : -1]
    said = torch.tensor(ids[begin:])
    return float(table_TV.gather(1, said[:, None]).sum()), bool((table_TV.argmax(-1) == said).all())


def test_choices_have_the_log_probabilities_of_the_model(harness):
    records, model, tokenizer = harness
    for question, sample in zip(QUESTIONS, records["tiny_choice"], strict=True):
        context = tokenizer.encode(question["context"])
        choices = map(tokenizer.encode, question["choices"])
        want = [score(model, [*context, *choice], len(context)) for choice in choices]
        got = [(float(one[0][0]), one[0][1] in (True, "True")) for one in sample["resps"]]
        assert [g[0] for g in got] == pytest.approx([w[0] for w in want], abs=1e-3)
        assert [g[1] for g in got] == [w[1] for w in want]
        best = max(range(3), key=lambda i: want[i][0])
        assert sample["acc"] == float(best == question["answer"])


def test_texts_are_those_of_generate(harness):
    records, model, tokenizer = harness
    for question, sample in zip(QUESTIONS, records["tiny_text"], strict=True):
        ids = tokenizer.encode(question["context"])
        sampling = Sampling(max_new_tokens=6, temperature=0.0)
        (made,) = generate(model, [ids], sampling, stop_id=tokenizer.document_id)
        assert sample["resps"][0][0] == tokenizer.decode(made).partition("\n")[0]


def test_whole_texts_are_scored_from_their_first_token(harness):
    records, model, tokenizer = harness
    for question, sample in zip(QUESTIONS, records["tiny_rolling"], strict=True):
        ids = [tokenizer.document_id, *tokenizer.encode(question["context"])]
        assert float(sample["resps"][0][0]) == pytest.approx(score(model, ids, 1)[0], abs=1e-3)
