"""Exports go to the Hub only where asked, whole, never to a public place by accident; what fails says what to do."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

from align_train.hub import push, pushing


class Hub:
    """Stands in for HfApi, and remembers."""

    def __init__(self, private=True, fails=None):
        self.private, self.fails, self.calls = private, fails, []

    def create_repo(self, repo, private, exist_ok):
        if self.fails:
            raise self.fails
        self.calls.append(("create", repo, private, exist_ok))
        return RepoUrl(f"https://hub.test/{repo}")

    def model_info(self, repo):
        return SimpleNamespace(private=self.private)

    def upload_folder(self, repo_id, folder_path, commit_message, delete_patterns):
        self.calls.append(("upload", repo_id, folder_path, delete_patterns))


class RepoUrl(str):
    __slots__ = ()

    @property
    def repo_id(self):
        return self.removeprefix("https://hub.test/")


@pytest.fixture
def exported(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "align"}')
    return tmp_path


@pytest.fixture
def hub(monkeypatch):
    def use(**settings):
        made = Hub(**settings)
        monkeypatch.setattr(pushing, "HfApi", lambda: made)
        monkeypatch.setattr(pushing, "get_token", lambda: "hf_test")
        return made

    return use


def test_the_folder_goes_to_a_private_repository_and_replaces_what_was_there(hub, exported):
    api = hub()
    assert push(exported, "me/birds") == "https://hub.test/me/birds"
    assert api.calls == [
        ("create", "me/birds", True, True),
        ("upload", "me/birds", exported, ["*.safetensors", "*.safetensors.index.json", "onnx/*"]),
    ]


def test_nothing_is_uploaded_to_a_public_repository_unless_asked(hub, exported):
    api = hub(private=False)
    with pytest.raises(ValueError, match="is public, so nothing was pushed: set private=false"):
        push(exported, "me/birds")
    assert [call[0] for call in api.calls] == ["create"]
    push(exported, "me/birds", private=False)
    assert [call[0] for call in api.calls] == ["create", "create", "upload"]


def answer(status):
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError("the server says no", response=response)


@pytest.mark.parametrize(
    ("fails", "says"),
    [
        (answer(401), "hf auth login"),
        (answer(403), "hf auth login"),
        (answer(500), r"the Hub answered 500 \(the server says no"),
        (HTTPError("refused"), r"the Hub cannot be reached.*\(refused\)"),
        (ConnectionError("offline mode is enabled"), "HF_HUB_OFFLINE"),
    ],
)
def test_what_fails_is_one_error_with_a_remedy(hub, exported, fails, says):
    hub(fails=fails)
    with pytest.raises(OSError, match=says) as raised:
        push(exported, "me/birds")
    assert str(raised.value).startswith(f"{exported} could not be pushed to me/birds: ")


def test_a_bad_name_is_told(hub, exported):
    hub(fails=HFValidationError("Repo id must be ..."))
    with pytest.raises(ValueError, match="push_to=a b names no repository, give one as NAME/MODEL"):
        push(exported, "a b")


def test_without_a_token_or_an_export_nothing_is_tried(hub, exported, tmp_path, monkeypatch):
    api = hub()
    monkeypatch.setattr(pushing, "get_token", lambda: None)
    with pytest.raises(OSError, match=r"there is no token of the Hugging Face Hub: log in .*: hf auth login"):
        push(exported, "me/birds")
    (exported / "config.json").unlink()
    with pytest.raises(ValueError, match="is no exported model, so it is not pushed"):
        push(exported, "me/birds")
    assert api.calls == []
