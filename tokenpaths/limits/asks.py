"""What a gate must stay shut on, made of nothing but the task's own prompts and the frozen model.

    content_of(prompts)                # ("Question: ", ["Who ...", ...], " Answer type:"): what prompts of a form share
    other_asks(prompts)                # other asks of the same contents, by name, every other one in a dress
    OPENINGS                           # what the frozen model is given to write kinds of text from

A gate that has never seen another ask of the same text takes the text for the task. A gate that has never seen another
ask in the same words takes the words for it. So asks are put to the task's contents in words of their own, and in the
words of the task's form with the last line changed.
"""

from __future__ import annotations

import os
import random
import re
from collections.abc import Sequence

LEAST = 4  # prompts of a form, from which what they share can be told

CUES = (
    "Topic", "Language", "Author", "Summary", "Title", "Number of words", "Translation", "Source", "Year", "Tone",
    "Keywords", "Next sentence", "First word", "Difficulty", "Length", "Spelling mistakes", "Reply", "Comment", "Genre",
    "Audience", "Rewritten", "In French", "Opposite", "Date", "Place", "Rhyme", "Score out of ten", "Style", "Name",
)  # fmt: skip
"""What may stand in the last line of a form in the place of its own cue."""

ASKS = {
    "translate": "Translate into German: {text}\nGerman:",
    "summarise": "{text}\n\nSum this up in three words:",
    "continue": "{text} And then",
    "language": "Which language is the following written in?\n{text}\nLanguage:",
    "repeat": "Repeat after me: {text}\nYou:",
    "count words": "How many words are there in \"{text}\"?",
    "count letters": "Text: {text}\nCount the letter e. Answer with a number:",
    "first word": "What is the first word of this text?\n\n{text}\n\nFirst word:",
    "title": "Write a headline for this.\n{text}\nHeadline:",
    "question about it": "Read this: {text}\nNow ask me one question about it:",
    "rewrite politely": "Make it polite.\nBefore: {text}\nAfter:",
    "upper case": "Write in capital letters: {text} ->",
    "is it English": "{text}\n\nIs that English? Yes or no:",
    "true or false": "{text}\nTrue or false?",
    "long or short": "Is this long or short?\n- long\n- short\n\n{text}\n\nAnswer:",
    "formal or informal": "Choose formal or informal.\nText: {text}\nChoice:",
    "grammar": "Sentence: {text}\nIs the grammar correct? Options: correct, incorrect\nAnswer:",
    "who wrote it": "Who would write this: a child, a teacher or a machine?\n{text}\nWriter:",
    "old or new": "{text}\nWas this written recently or long ago? Answer:",
    "subject": "Subject of the following, one of science, sport, politics, art, daily life.\n{text}\nSubject:",
    "chat explain": "User: What does this mean? \"{text}\"\nAssistant:",
    "chat reply": "User: {text}\nAssistant:",
    "chat rhyme": "User: Write a rhyme that begins with: {text}\nAssistant:",
    "email": "Dear Sam,\n\nyesterday I read this: \"{text}\" What I wanted to ask you is",
    "code": "text = \"{text}\"\nprint(len(text))\n# prints",
    "json": "{{\"text\": \"{text}\", \"id\":",
    "noun list": "List the nouns.\nInput: {text}\nOutput:",
    "spell backwards": "{text}\nThe last word spelled backwards is",
    "opposite": "Say the opposite of this: {text}\nOpposite:",
    "how sure": "{text}\nOn a scale from 1 to 5, how hard is this to understand? I would say",
    "price": "Instruction: estimate how long it takes to read the text, in seconds.\nText: {text}\nResponse:",
    "answer it": "{text}\nMy answer to that is:",
    "place in a book": "\"{text}\" This stands in a book on page",
    "keywords": "### Text\n{text}\n\n### Keywords\n",
    "punctuation": "Q: Which punctuation mark does this end in? {text}\nA:",
    "plural": "Is there a plural noun in it (yes/no)? {text} =>",
    "starts with": "Does the text begin with a vowel? Options:\n- yes\n- no\n{text}\n",
    "mood": "Finish the story. {text} The next morning,",
    "tweet": "Turn this into a tweet with a hashtag.\n\n{text}\n\nTweet: #",
    "quote": "He read it out loud: \"{text}\" Everyone was silent. She said:",
}  # fmt: skip
"""Other asks of any text, in the styles that people ask in."""

DRESSES = (
    "User: {}\nAssistant:", "### Instruction:\n{}\n\n### Response:\n", "<prompt>{}</prompt>\n<output>", "Q: {}\nA:",
    "{{\"prompt\": \"{}\", \"output\": \"", "Below is a task. Write only the answer.\n\n{}\n\nAnswer:", "{} =>",
    "Please help me with this.\n\n{}", "{}\nLet us think.",
)  # fmt: skip
"""What whole prompts are put into, so that a dress does not tell what is asked."""

OPENINGS = (
    "The ", "Question:", "User:", "def ", "import ", "Once upon a time", "Dear ", "1.", "# ", "Q: ", "Translate",
    "Write a ", "What is ", "How do I ", "Summary:", "Title:", "Answer:", "<p>", "{\"", "In this paper", "News:",
    "- ", "Roses are ", "A: Hello.\nB:", "Sentence:", "Is it true that", "Choose the", "Classify", "Input:", "Task:",
    "Recipe:", "Chapter 1", "Solve", "Text:", "Review:", "Instructions:", "Name:", "Explain ", "Complete",
)  # fmt: skip
"""The beginnings of texts and prompts of many kinds, from which the frozen model writes on."""


def content_of(prompts: Sequence[str]) -> tuple[str, list[str], str]:
    """What the prompts of one form share before and behind their contents, and these contents.

    Words are not cut in two. Contents that are all the same, or empty, are whole prompts.
    """
    before = os.path.commonprefix(list(prompts))
    before = before[: len(before) - len(re.split(r"(?<=\s)", before)[-1])] if before != prompts[0] else before
    rest = [prompt[len(before) :] for prompt in prompts]
    behind = os.path.commonprefix([part[::-1] for part in rest])[::-1]
    if not all(part[: len(part) - len(behind)][-1:].isspace() for part in rest):
        found = re.search(r"\s", behind)
        behind = "" if found is None else behind[found.start() :]
    contents = [part[: len(part) - len(behind)] for part in rest]
    if len(prompts) < LEAST or not all(content.strip() for content in contents) or len(set(contents)) == 1:
        return "", list(prompts), ""
    return before, contents, behind


def other_asks(prompts: Sequence[str], each: int, seed: int = 0) -> dict[str, list[str]]:
    """Other asks of the contents of prompts of one form, `each` prompts of every ask, every other one in a dress.

    Those that are named "cue ..." are in the form's own words but for its last line, which asks for something else.
    """
    rng = random.Random(f"asks {seed}")
    before, contents, behind = content_of(prompts)
    contents = [" ".join(content.split()) if "\n" not in content.strip() else content.strip() for content in contents]
    asks: dict[str, list[str]] = {}
    for name, template in ASKS.items():
        plain = [template.format(text=text) for text in _some(rng, contents, each)]
        asks[name] = [(rng.choice(DRESSES) if i % 2 else "{}").format(text) for i, text in enumerate(plain)]
    body, line, cue = behind.rpartition("\n")
    if cue.strip() and line:
        end = ":" if cue.rstrip().endswith(":") else ""
        for word in CUES:
            if word.lower() not in cue.lower():
                told = [f"{before}{text}{body}{line}{word}{end}" for text in _some(rng, contents, each)]
                asks[f"cue {word.lower()}"] = told
    return asks


def _some(rng: random.Random, contents: Sequence[str], count: int) -> list[str]:
    return rng.sample(list(contents), min(count, len(contents)))
