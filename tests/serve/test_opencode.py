"""opencode works with the server: give its binary as MIMOFLASH_OPENCODE, or have it on the PATH."""

import json
import os
import shutil
import subprocess

import pytest

OPENCODE = os.environ.get("MIMOFLASH_OPENCODE") or shutil.which("opencode")
MODEL = {
    "name": "scripted", "reasoning": True, "interleaved": {"field": "reasoning_content"}, "tool_call": True,
    "limit": {"context": 32_768, "output": 2048}, "options": {"reasoningEffort": "high"},
}
CALL = (
    "<tool_call>\n<function=bash>\n<parameter=command>echo hello > greeting.txt; echo it is there</parameter>\n"
    "<parameter=description>Writes a greeting</parameter>\n</function>\n</tool_call>"
)


def config(url: str) -> str:
    provider = {
        "npm": "@ai-sdk/openai-compatible", "options": {"baseURL": f"{url}/v1", "apiKey": "none"},
        "models": {"scripted": MODEL},
    }
    return json.dumps({"model": "here/scripted", "enabled_providers": ["here"], "provider": {"here": provider}})


def script(prompt: str) -> str:
    if "<name>bash</name>" not in prompt:
        return "A greeting"  # the conversation's title
    return "It is written." if "<tool_response>" in prompt else f"<think>A file, then.</think>Let me write it.{CALL}"


@pytest.mark.skipif(not OPENCODE, reason="no opencode: see above")
def test_opencode_runs_a_command_and_reads_what_came_of_it(scripted_code_server, tmp_path):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    unconnected = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS", "SHARE")
    environment = {f"OPENCODE_DISABLE_{what}": "1" for what in unconnected} | {
        "PATH": os.environ["PATH"], "HOME": str(home), "OPENCODE_CONFIG_CONTENT": config(scripted_code_server(script)),
    }
    ran = subprocess.run(
        [OPENCODE, "run", "--thinking", "Write a greeting."], cwd=work, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == "Thinking: A file, then.\nLet me write it.\nIt is written.\n"
    assert (work / "greeting.txt").read_text() == "hello\n"
    first, second = (prompt for prompt, _ in scripted_code_server.engine.asked if "<name>bash</name>" in prompt)
    assert first.endswith("<|im_start|>assistant\n")  # to be reasoned about
    assert f"<think>A file, then.</think>Let me write it.{CALL}<|im_end|>" in second
    assert "<tool_response>\nit is there\n" in second
