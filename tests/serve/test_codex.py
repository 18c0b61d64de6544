"""OpenAI's codex works with the server: give its binary as MIMOFLASH_CODEX, or have it on the PATH."""

import os
import shutil
import subprocess

import pytest

CODEX = os.environ.get("MIMOFLASH_CODEX") or shutil.which("codex")
CONFIG = """
model = "scripted"
model_provider = "here"
model_reasoning_effort = "high"
[model_providers.here]
name = "here"
base_url = "{url}/v1"
wire_api = "responses"
[analytics]
enabled = false
"""
CALL = (
    "<tool_call>\n<function=exec_command>\n<parameter=cmd>echo hello > greeting.txt</parameter>\n</function>\n"
    "</tool_call>"
)


def script(prompt: str) -> str:
    return "It is written." if "<tool_response>" in prompt else f"<think>A file, then.</think>Let me write it.{CALL}"


@pytest.mark.skipif(not CODEX, reason="no codex: see above")
def test_codex_runs_a_command_and_reads_what_came_of_it(scripted_code_server, tmp_path):
    url = scripted_code_server(script)
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    (home / "config.toml").write_text(CONFIG.format(url=url))
    ran = subprocess.run(
        [CODEX, "exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", "Write a greeting."],
        cwd=work, env={"PATH": os.environ["PATH"], "HOME": str(home), "CODEX_HOME": str(home)},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "It is written."
    assert "A file, then." in ran.stderr  # its user sees the reasoning
    assert (work / "greeting.txt").read_text() == "hello\n"
    first, second = (prompt for prompt, _ in scripted_code_server.engine.asked)
    assert "<name>multi_agent_v1.spawn_agent</name>" in first
    assert f"<think>A file, then.</think>Let me write it.{CALL}<|im_end|>" in second
    assert "Process exited with code 0" in second
