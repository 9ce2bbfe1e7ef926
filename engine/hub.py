"""Files from the Hugging Face hub; and `quiet`, which hides the libraries' own messages."""

import importlib
import logging
import warnings
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import validate_repo_id

from engine.errors import UserError


# -------------------------------------------------------------------------------------- here, or from the hub
def quiet():
    """Hide the libraries' own progress bars and notices. Errors are raised as before."""
    # Imported here: flags are read with this module, and these libraries take seconds to import.
    for library in ("diffusers", "transformers"):
        log = importlib.import_module(f"{library}.utils.logging")
        log.set_verbosity(logging.CRITICAL)
        log.disable_progress_bar()
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument is deprecated")


def fetched(where, files):
    """The local path of `where`: itself if it exists, otherwise the folder of a hub repository's files.

    files: a list of names or patterns, downloaded if they are not cached. If *.safetensors is asked for and the
    repository has none, its .bin files are downloaded instead. Raises UserError if `where` is neither a path nor a
    repository.
    """
    if Path(where).is_file() or Path(where).is_dir():
        return Path(where)
    if Path(where).exists():  # reading from a pipe would wait forever
        raise UserError(f"{where}: neither a file nor a folder")
    if str(where).count("/") != 1 or str(where).startswith((".", "/")):
        raise UserError(f"{where}: no such file or folder")
    quiet()
    try:
        folder = Path(snapshot_download(where, allow_patterns=files))
        if "*.safetensors" in files and not list(folder.glob("*.safetensors")):
            snapshot_download(where, allow_patterns="*.bin")
        return folder
    except Exception as error:
        raise not_fetched(where, error) from error


def may_push(name):
    """Make the repository of a hub id, unless it exists. Raises UserError if this user may not: before a run, so that
    nothing is trained in vain."""
    login = f"--push-to-hub {name}"
    try:
        validate_repo_id(name)
        _, _ = name.split("/")
    except ValueError as error:
        raise UserError(f"{login}: is no name on the hub; give OWNER/NAME") from error
    try:
        HfApi().whoami()
    except Exception as error:
        raise UserError(f"{login}: the hub does not know you ({type(error).__name__}); hf auth login, or set "
                        "HF_TOKEN") from error
    try:
        HfApi().create_repo(name, exist_ok=True)
    except Exception as error:
        raise UserError(f"{login}: the hub does not let you write there ({type(error).__name__}); give a name of your "
                        "own, and a token that may write") from error


def push(name, folder, files):
    """Upload some files of a folder to a hub id. Raises UserError, which says how to do it again."""
    try:
        done = HfApi().upload_folder(repo_id=name, folder_path=folder, allow_patterns=files,
                                     commit_message="SRPO (arXiv 2509.06942)")
    except Exception as error:
        raise UserError(f"--push-to-hub {name}: not uploaded ({type(error).__name__}); everything is in {folder}; "
                        f"hf upload {name} {folder}") from error
    print(f"uploaded: {getattr(done, 'commit_url', None) or name}")


def not_fetched(what, error):
    """The UserError for something that is neither here nor can be downloaded."""
    return UserError(f"{what}: not on this machine, and cannot be fetched from the hub ({type(error).__name__})")


def some_files(name, wanted, whose):
    """The local folder of those files of a hub repository that wanted(all its files) lists; whose: begins a message.
    Without a network it is the folder that an earlier call filled. Raises UserError."""
    quiet()
    try:
        files = [one.rfilename for one in HfApi().model_info(name).siblings]  # list_repo_files tries for 24 seconds
    except Exception as error:
        try:
            return Path(snapshot_download(name, local_files_only=True))
        except Exception:
            raise UserError(f"{whose}, and the hub does not give it ({type(error).__name__})") from error
    patterns = wanted(files)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        raise UserError(f"{whose}, and the hub does not give {patterns[0]} ({type(error).__name__})") from error
