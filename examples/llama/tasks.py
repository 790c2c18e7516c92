"""What a language model is trained on: prompts, and rewards that read its answer in plain Python.

A task is a list of `Question`s to train on and one held out, whose subjects don't occur in training.
"""

import ast
import dataclasses
import fractions
import json
import operator
import random
import re
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Question:
    """A chat, and the reward of an answer to it, at most 1."""

    chat: list[dict[str, str]]
    reward: Callable[[str], float]


@dataclasses.dataclass(frozen=True)
class Task:
    train: list[Question]
    held_out: list[Question]
    length: int  # of an answer, in tokens
    begun: str = ""  # what every answer begins with


def asked(content: str, reward: Callable[[str], float], system: str = "") -> Question:
    chat = [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": content}]
    return Question(chat, reward)


def split(questions: list[Question], seed: int, held_out: int, **settings) -> Task:
    random.Random(seed).shuffle(questions)
    return Task(questions[held_out:], questions[:held_out], **settings)


# ---- JSON

THINGS = """
person book city dog car film river song planet school recipe phone house tree museum team game plant restaurant flower
airport bridge computer castle ship painting mountain bird hotel train
"""
KEYS = ("name", "age", "color", "year", "price", "size", "country", "weight", "type", "rating")


def json_reward(keys: tuple[str, ...]) -> Callable[[str], float]:
    """1 for a JSON object with exactly these keys; what stands around it costs up to 0.5. Keys alone are worth 0.25."""

    def reward(answer: str) -> float:
        inner = answer[answer.find("{") : answer.rfind("}") + 1]
        try:
            found = json.loads(inner)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and set(found) == set(keys):
            return 0.5 + 0.5 * len(inner) / len(answer)
        return 0.25 * sum(f'"{key}":' in answer for key in keys) / len(keys)

    return reward


def json_task(seed: int) -> Task:
    """Things described by two keys, as JSON and nothing else; held out are things, and keys."""
    draw = random.Random(seed)
    things, keys = draw.sample(THINGS.split(), 30), draw.sample(KEYS, len(KEYS))

    def question(thing: str, keys: list[str]) -> Question:
        content = (
            f'Describe a {thing} as a JSON object with the keys "{keys[0]}" and "{keys[1]}". Reply with JSON only.'
        )
        return asked(content, json_reward(tuple(keys)))

    seen, unseen = (things[16:], keys[:6]), (things[:16], keys[6:])
    train, held_out = (
        [question(thing, draw.sample(keys, 2)) for thing in things for _ in range(times)]
        for (things, keys), times in ((seen, 8), (unseen, 2))
    )
    return Task(train, held_out, length=32)


# ---- conciseness

CAPITALS = """
Austria Vienna|Belgium Brussels|Bulgaria Sofia|Canada Ottawa|Chile Santiago|China Beijing|Colombia Bogota|Croatia Zagreb
Cuba Havana|Denmark Copenhagen|Egypt Cairo|England London|Finland Helsinki|France Paris|Germany Berlin|Ghana Accra
Greece Athens|Hungary Budapest|India Delhi|Indonesia Jakarta|Iran Tehran|Iraq Baghdad|Ireland Dublin|Italy Rome
Jamaica Kingston|Japan Tokyo|Jordan Amman|Kenya Nairobi|Latvia Riga|Lebanon Beirut|Libya Tripoli|Nepal Kathmandu
Norway Oslo|Pakistan Islamabad|Peru Lima|Poland Warsaw|Portugal Lisbon|Romania Bucharest|Russia Moscow|Serbia Belgrade
Somalia Mogadishu|Spain Madrid|Sweden Stockholm|Syria Damascus|Thailand Bangkok|Tunisia Tunis|Turkey Ankara
Uganda Kampala|Ukraine Kyiv|Venezuela Caracas|Vietnam Hanoi|Zambia Lusaka|Senegal Dakar|Qatar Doha|Estonia Tallinn
Algeria Algiers|Afghanistan Kabul|Angola Luanda|Lithuania Vilnius|Philippines Manila|Slovenia Ljubljana|Ecuador Quito
"""


def concise_reward(reference: str) -> Callable[[str], float]:
    """1 for a right answer, and less by a hundredth a letter that it is longer or shorter than the reference."""

    def reward(answer: str) -> float:
        right = reference.lower() in answer.lower()
        return right - min(abs(len(answer) - len(reference)) / 100, 1)

    return reward


def concise_task(seed: int) -> Task:
    """Capitals, named and nothing more."""
    pairs = [pair.split() for pair in CAPITALS.replace("\n", "|").strip("|").split("|")]
    questions = [asked(f"What is the capital of {land}?", concise_reward(city)) for land, city in pairs]
    return split(questions, seed, 32, length=16)


# ---- Countdown, as https://github.com/Jiayi-Pan/TinyZero published its prompt and its reward

SYSTEM = (
    "You are a helpful assistant. You first thinks about the reasoning process in the mind and then provides the user "
    "with the answer."
)
COUNTDOWN = (
    "Using the numbers {numbers}, create an equation that equals {target}. You can use basic arithmetic operations "
    "(+, -, *, /) and each number can only be used once. Show your work in <think> </think> tags. And return the final "
    "answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>."
)
OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def value(node: ast.AST, numbers: list[int]) -> fractions.Fraction:
    """What an expression of whole numbers is worth; notes its numbers. ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return fractions.Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](value(node.left, numbers), value(node.right, numbers))
    raise ValueError("not an expression of numbers")


def countdown_reward(numbers: tuple[int, ...], target: int) -> Callable[[str], float]:
    """1 for an expression in the tags that uses each number once and equals the target, 0.1 for anything in them."""

    def reward(answer: str) -> float:
        said = re.findall(r"<answer>(.*?)</answer>", answer, re.DOTALL)
        if not said:
            return 0.0
        used = []
        try:
            reached = value(ast.parse(said[-1].strip(), mode="eval").body, used)
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return 0.1
        return 1.0 if reached == target and sorted(used) == sorted(numbers) else 0.1

    return reward


def countdown_task(seed: int) -> Task:
    """Three or four numbers below 100, and a target below 100 that they reach."""
    draw, questions = random.Random(seed), []
    while len(questions) < 1200:
        numbers = tuple(draw.randint(1, 99) for _ in range(draw.choice((3, 4))))
        target = fractions.Fraction(numbers[0])
        for number in numbers[1:]:
            target = draw.choice(list(OPERATIONS.values()))(target, fractions.Fraction(number))
        if target.denominator == 1 and 10 <= target < 100:
            shown = draw.sample(numbers, len(numbers))
            content = COUNTDOWN.format(numbers=shown, target=target)
            questions.append(asked(content, countdown_reward(numbers, int(target)), SYSTEM))
    return split(questions, seed, 200, length=512, begun="Let me solve this step by step.\n<think>")


TASKS = {"json": json_task, "concise": concise_task, "countdown": countdown_task}
