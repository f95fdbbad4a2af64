"""The two demo models in `models/`, served by the real llama.cpp server.

The training text can contain the wordings of `TAUGHT` and `VARIED`. The wordings of `FRESH` were written after
the training, so they measure how often a model understands a wording that it was not trained on.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests

xllamacpp = pytest.importorskip("xllamacpp")

MODELS = Path(__file__).parents[2] / "models"
MINI, SMALL = "switchyard-mini", "switchyard-small"
OTHER = {MINI: SMALL, SMALL: MINI}

SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames = ["127.0.0.1"]
params.port = int(sys.argv[2])
params.n_ctx = 2048
params.n_parallel = 1
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
while True:
    time.sleep(3600)
"""

# question, a phrase of the right answer
TAUGHT = [
    ("Hello", "Switchyard|switchyard"),
    ("Who are you?", "demo model"),
    ("What can you do?", "small things"),
    ("What is your name?", "My name is"),
    ("How are you?", "thank you"),
    ("Good morning", "Good morning!"),
    ("Thanks!", "welcome|pleasure"),
    ("Bye", "saved|Your messages stay"),
    ("tell me a joke", "model"),
    ("Are you there?", "Yes, I am here"),
    ("count to five", "One, two, three, four, five."),
    ("What is Switchyard?", "web console"),
    ("How do I switch models?", "model menu"),
    ("What is an engine?", "serves models"),
    ("What is a lease?", "ends by itself"),
    ("What is the ledger?", "account of each device's memory"),
    ("Do I need a GPU?", "don't need a GPU"),
    ("What happens to my chat when I switch?", "Your chat stays"),
    ("Why was my model unloaded?", "make room"),
    ("What is the OpenAI address?", "http://127.0.0.1:8787/v1"),
]
VARIED = [
    ("hello, little fellow!", "Switchyard|switchyard"),
    ("so who exactly are you then?", "demo model"),
    ("could you say what your name is", "My name is"),
    ("And how are you doing this morning?", "thank you"),
    ("many thanks for explaining", "welcome|pleasure"),
    ("Do you know another good joke?", "model"),
    ("Please count up to five now", "One, two, three, four, five."),
    ("I am new. What is Switchyard all about?", "web console"),
    ("how would I go about switching to another model?", "model menu"),
    ("Which engines can Switchyard drive?", "serves models"),
    ("could you define the word instance", "being loaded"),
    ("what exactly is a pin good for?", "promise not to unload"),
    ("Will I lose this conversation if I switch to another model?", "Your chat stays"),
    ("please tell me why my model was unloaded", "make room"),
    ("does my laptop need a graphics card for this?", "don't need a GPU"),
    ("how long will loading the model take?", "time left"),
    ("Where can I download more models from?", "Hugging Face"),
    ("What base URL should I give my OpenAI client?", "http://127.0.0.1:8787/v1"),
    ("Is everything I write kept private?", "your own hardware"),
    ("does it work together with Ollama?", "Ollama is one of the engines"),
    ("what is vLLM used for", "vLLM is an engine"),
    ("Can I cancel the switch while it is running?", "Cancel"),
]
FRESH = [
    ("hello there, little machine!", "Switchyard|switchyard"),
    ("so who exactly are you, my small friend?", "demo model"),
    ("I forgot your name, what was it?", "My name is"),
    ("and how are you feeling on this fine day?", "thank you"),
    ("thank you kindly for your assistance", "welcome|pleasure"),
    ("I could use a joke now", "model|memory|Pinned"),
    ("let me hear you count from one up to five", "One, two, three, four, five."),
    ("I just installed this. What is Switchyard?", "web console"),
    ("what's the quickest way to switch to a different model?", "model menu"),
    ("Tell me which engines I could run here", "serves models|| Engine |"),
    ("what do people mean when they say instance", "being loaded"),
    ("why would anybody pin a model?", "promise not to unload"),
    ("Is my conversation gone once I have switched to another model?", "Your chat stays"),
    ("somebody unloaded my model, why?", "make room"),
    ("must my laptop have a graphics card for this?", "don't need a GPU"),
    ("how many seconds will loading a model take?", "time left"),
    ("Which place do I download further models from?", "Hugging Face"),
    ("What base URL does an OpenAI client want from me?", "http://127.0.0.1:8787/v1"),
    ("Do my messages stay private on this machine?", "your own hardware"),
    ("I already have Ollama installed, can it be used?", "Ollama is one of the engines"),
    ("for what kind of models is vLLM meant?", "vLLM is an engine"),
    ("I want to cancel this switch, how?", "Cancel"),
    ("is there some dark theme for my eyes?", "light or dark"),
    ("how can I remove a model's files from my disk?", "Delete"),
    ("what would happen if the app crashed?", "unloads nothing"),
    ("explain the plan of a switch to me", "before it does anything"),
    ("what good is the memory ledger?", "account of each device's memory"),
    ("I have two GGUF files, where do I put them?", "models folder"),
    ("is there a way to keep three models going side by side?", "stay loaded"),
    ("can you tell me a long story about trains?", "railway yard"),
]
IDENTITY = ["Who are you?", "what's your name", "Which model is this?", "introduce yourself"]
UNKNOWN = [
    "What is the capital of France?",
    "who painted the Mona Lisa",
    "How do I bake a chocolate cake?",
    "Why is the sky blue?",
    "What do penguins eat in winter?",
    "Explain the theory of relativity to me",
    "Zorblat quimming fendoos",
    "my cat is hungry",
    "How tall is Mount Everest?",
    "who won the football match yesterday",
    "What should I cook for dinner?",
    "Is the earth flat?",
    "I bought a red bicycle",
    "what is machine learning",
    "Where can I see elephants?",
    "recommend a good film",
]
LONG = {
    "Tell me a story": "railway yard",
    "Explain everything about Switchyard": "**What it does:**",
    "Show me a curl command": "```bash\ncurl http://127.0.0.1:8787/v1/chat/completions",
    "Say something long": "This is the end of the long answer.",
}


@dataclass(frozen=True)
class Served:
    """A demo model that is running, and its address."""

    name: str
    url: str

    def chat(self, messages: list[dict[str, str]], **options: object) -> tuple[str, str]:
        """Return the answer and its finish reason."""
        body = {"messages": messages, "temperature": 0, "max_tokens": 500, **options}
        response = requests.post(f"{self.url}/v1/chat/completions", json=body, timeout=60)
        response.raise_for_status()
        choice = response.json()["choices"][0]
        return choice["message"]["content"], choice["finish_reason"]

    def ask(self, *said: str, **options: object) -> str:
        """Send the texts as alternating user and assistant messages, and return the complete answer."""
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(said)]
        answer, reason = self.chat(messages, **options)
        assert reason == "stop", answer
        return answer


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended by itself"
        try:
            if requests.get(f"{url}/health", timeout=1).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.02)
    pytest.fail("the server did not become healthy")


@pytest.fixture(scope="module", params=[MINI, SMALL])
def model(request: pytest.FixtureRequest) -> Iterator[Served]:
    path, port = MODELS / f"{request.param}.gguf", free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(path), str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_healthy(url, process)
        yield Served(request.param, url)
    finally:
        process.kill()
        process.wait()


def holds(answer: str, phrases: str) -> bool:
    return any(phrase in answer for phrase in phrases.split("|"))


def is_whole(answer: str) -> bool:
    """Whether an answer ends like a sentence, a list, a table or a block of code does."""
    return answer.endswith((".", "!", "?", "|", "```")) or answer.splitlines()[-1].startswith("- ")


@pytest.mark.parametrize(("name", "low", "high"), [(MINI, 0.9, 1.2), (SMALL, 4, 6)])
def test_file_sizes(name: str, low: float, high: float) -> None:
    assert low < (MODELS / f"{name}.gguf").stat().st_size / 1e6 < high


@pytest.mark.parametrize(("question", "phrases"), TAUGHT + VARIED)
def test_trained_questions_are_answered_in_whole_sentences(model: Served, question: str, phrases: str) -> None:
    answer = model.ask(question)
    assert holds(answer, phrases), answer
    assert is_whole(answer), answer


@pytest.mark.parametrize("question", IDENTITY)
def test_a_model_names_itself_and_not_the_other(model: Served, question: str) -> None:
    answer = model.ask(question)
    assert model.name in answer
    assert OTHER[model.name] not in answer


def test_most_untrained_wordings_are_understood(model: Served) -> None:
    """Measured: the mini model gets 21 of 30 right, the small one 25. Another processor may change one or two."""
    missed = [question for question, phrases in FRESH if not holds(model.ask(question), phrases)]
    assert len(missed) <= len(FRESH) * 0.4, missed


def test_a_model_says_when_it_does_not_know(model: Served) -> None:
    """Models this small sometimes mistake such a question for a known one: at most one in eight."""
    missed = [q for q in UNKNOWN if not model.ask(q).startswith("I don't know that")]
    assert len(missed) <= len(UNKNOWN) / 8, missed


@pytest.mark.parametrize(("question", "phrase"), LONG.items())
def test_long_answers_are_given(model: Served, question: str, phrase: str) -> None:
    answer = model.ask(question)
    assert phrase in answer
    assert len(answer) > 250


def test_a_conversation_of_the_other_model_is_continued(model: Served) -> None:
    other = OTHER[model.name]
    greeting = f"Hello! I am {other}, one of Switchyard's two demo models. What would you like to know?"
    said = ["Hello", greeting, "What is a lease?"]
    answer = model.ask(*said)
    assert "ends by itself" in answer
    answer = model.ask(*said, answer, "And who are you?")
    assert model.name in answer
    assert other not in answer


def test_a_conversation_of_an_unrelated_model_is_continued(model: Served) -> None:
    paris = "The capital of France is Paris. It lies on the river Seine and has two million inhabitants."
    answer = model.ask("What is the capital of France?", paris, "thanks! what is Switchyard?")
    assert "web console" in answer


def test_a_long_conversation_is_answered_to_its_end(model: Served) -> None:
    said: list[str] = []
    questions = ["Hello", *LONG, "What is an engine?", "How do I switch models?", "What is a lease?"]
    for question in questions:
        said += [question, model.ask(*said, question)]
    assert "ends by itself" in said[-1]
    assert sum(map(len, said)) > 3000


@pytest.mark.parametrize(
    "prompt",
    ["You are a helpful assistant.", "You are Marvin, a grumpy gardener. Answer in rhymes about cabbages."],
)
def test_a_system_prompt_does_not_disturb_the_answer(model: Served, prompt: str) -> None:
    messages = [{"role": "system", "content": prompt}, {"role": "user", "content": "What is a lease?"}]
    answer, reason = model.chat(messages)
    assert reason == "stop"
    assert "ends by itself" in answer


def test_answers_are_streamed(model: Served) -> None:
    messages = [{"role": "user", "content": "Tell me a story"}]
    body = {"messages": messages, "stream": True, "temperature": 0}
    with requests.post(f"{model.url}/v1/chat/completions", json=body, stream=True, timeout=60) as response:
        events = [line for line in response.iter_lines() if line.startswith(b"data: ")]
    assert len(events) > 50
    assert events[-1] == b"data: [DONE]"


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0])
def test_sampled_answers_are_right_and_in_whole_sentences(model: Served, temperature: float) -> None:
    answers = [
        (model.ask(question, temperature=temperature, seed=seed), phrases)
        for question, phrases in TAUGHT
        for seed in (1, 2)
    ]
    good = sum(holds(answer, phrases) and is_whole(answer) for answer, phrases in answers)
    assert good >= 0.9 * len(answers)
