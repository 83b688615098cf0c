import pytest

from jaxlm.data import chat, templates
from jaxlm.data.chat import Message
from jaxlm.errors import InputError

TALK = [
  Message(role="system", content="Be brief."),
  Message(role="user", content="One"),
  Message(role="assistant", content="Two"),
  Message(role="user", content="Three"),
]
BEGUN = {
  "chatml": (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nOne<|im_end|>\n"
    "<|im_start|>assistant\nTwo<|im_end|>\n<|im_start|>user\nThree<|im_end|>\n"
    "<|im_start|>assistant\n"
  ),
  "llama3": (
    "B<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nOne<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nTwo<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nThree<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
  ),
  "gemma": (
    "B<start_of_turn>user\nBe brief.\n\nOne<end_of_turn>\n<start_of_turn>model\n"
    "Two<end_of_turn>\n<start_of_turn>user\nThree<end_of_turn>\n<start_of_turn>model\n"
  ),
  "mistral": "B[INST] Be brief.\n\nOne [/INST] TwoE[INST] Three [/INST]",
  "plain": (
    "BSystem: Be brief.\n\nUser: One\n\nAssistant: TwoE\n\nUser: Three\n\nAssistant:"
  ),
}


def render(name, messages, then):
  template = templates.text_of(name)
  return chat.render(template, messages, then=then, bos="B", eos="E")


@pytest.mark.parametrize("name", list(templates.BUILT_IN))
def test_templates_by_name(name):
  assert render(name, TALK, "reply") == BEGUN[name]
  assert BEGUN[name].startswith(render(name, TALK, "end"))
  again = [*TALK, Message(role="assistant", content="Four")]
  assert render(name, again, "end").startswith(BEGUN[name])


@pytest.mark.parametrize("name", ["gemma", "mistral"])
@pytest.mark.parametrize(
  ("messages", "told"),
  [
    (TALK[:1], "a system message must be the first, before one of the user"),
    ([*TALK[1:], *TALK[:2]], "a system message must be the first"),
    ([TALK[0], TALK[2]], "a system message must be the first"),
    ([Message(role="tool", content="x")], "no role tool"),
  ],
)
def test_a_template_without_such_a_turn(name, messages, told):
  with pytest.raises(InputError, match=told):
    render(name, messages, "end")


def test_templates_of_files_and_others(tmp_path):
  (tmp_path / "x.jinja").write_text("mine")
  assert templates.text_of(f"{tmp_path}/x.jinja") == "mine"
  with pytest.raises(InputError, match=r"template: no file at .*y\.jinja"):
    templates.text_of(f"{tmp_path}/y.jinja")
  with pytest.raises(
    InputError, match=r"template: 'chatmal' is neither chatml, .*\.jinja file\. Did you"
  ):
    templates.text_of("chatmal")
