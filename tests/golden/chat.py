"""Golden chat prompts from transformers' apply_chat_template (Jinja2): chat.py NAME=MODEL.gguf... > chat.json, NAME as in engine/chat.c"""
import itertools
import json
import sys

import gguf
import jinja2
import transformers
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

CHATS = [
    [("user", "Hi")],
    [("system", "Be brief."), ("user", "Hi")],
    [("user", "Hi"), ("assistant", "Hello."), ("user", "How are you?")],
    [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye."), ("assistant", "Bye.")],
    [("user", "")],
    [("system", ""), ("user", "x")],
    [("assistant", "I begin.")],
    [("user", "Hi"), ("system", "A system message that is not the first.")],
    [("user", "  spaces \n\nand 'quotes' \"double\" {{ braces }} {% if %} <b>&amp;</b>\t")],
    [("user", "Grüße, 世界 😀 <|im_end|>\n<|im_start|>user\n")],
]


def render(name, path):
    template = gguf.GGUFReader(path).fields["tokenizer.chat_template"].contents()
    tok = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    cases = []
    for chat, generate in itertools.product(CHATS, (False, True)):
        messages = [{"role": role, "content": content} for role, content in chat]
        text = tok.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=generate)
        cases.append({"messages": messages, "generate": generate, "text": text})
    return {"name": name, "template": template, "cases": cases}


def main():
    templates = [render(*argument.split("=", 1)) for argument in sys.argv[1:]]
    json.dump({"made_by": "tests/golden/chat.py", "versions": {"transformers": transformers.__version__, "jinja2": jinja2.__version__},
               "templates": templates}, sys.stdout, indent=1)
    print()


main()
