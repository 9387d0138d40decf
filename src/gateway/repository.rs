//! The models directory: `<id>.onnx` runs in the node, `<id>.json` names a model server. A model's digest is its file's SHA-256.
//! `<id>.config.json` beside it may say how the node computes it, and is no part of it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use crate::core::ids::{Digest, ModelId};
use crate::core::state::Model;
use crate::gateway::backend::Backend;
use crate::gateway::net::Net;
use crate::gateway::onnx::Onnx;
use crate::gateway::server_file::Servers;
use crate::gateway::settings::{MODEL_SETTINGS_BYTES_MAX, Settings};
use crate::gateway::upstream::Upstream;
use crate::gateway::workers::said;

/// Largest model file, in bytes: what one Protocol Buffers message may have.
pub const MODEL_BYTES_MAX: u64 = 2 << 30;
/// Largest file that names a model server, in bytes.
pub const SERVER_FILE_BYTES_MAX: u64 = 64 << 10;

/// Behind a model's id, in the name of its settings' file. So no model server's id may end in it.
const SETTINGS_SUFFIX: &str = ".config";

/// The models directory.
#[derive(Clone, Debug)]
pub(crate) struct Repository {
    dir: PathBuf,
    /// What was hashed last: a large model is read once, not for every proposal that names it.
    known: Arc<Mutex<BTreeMap<PathBuf, (Stamp, Digest)>>>,
}

/// What tells one content of a file from the next without reading it. The change time cannot be set back.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(path: &Path) -> Option<Stamp> {
        let meta = fs::metadata(path).ok()?;
        let (modified, changed) = ((meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()));
        Some(Stamp { inode: meta.ino(), bytes: meta.len(), modified, changed })
    }
}

/// Where a model is computed, by its file's ending.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Here,
    Server,
}

impl Repository {
    pub(crate) fn new(dir: PathBuf) -> Repository {
        Repository { dir, known: Arc::default() }
    }

    /// The digest of a model's file as it is now, if it has been read since it last changed.
    pub(crate) fn known_digest(&self, id: &ModelId) -> Option<Digest> {
        let (path, _) = self.find(id).ok()?;
        let stamp = Stamp::of(&path)?;
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(&path).filter(|(seen, _)| *seen == stamp).map(|(_, digest)| *digest)
    }

    /// The digest of a model's file as it is now. Reads the file: not for an executor's thread.
    pub(crate) fn digest(&self, id: &ModelId) -> Result<Digest, String> {
        let (path, place) = self.find(id)?;
        let before = Stamp::of(&path);
        let digest = Self::read_digest(&path, place)?;
        // A file that changed while it was read is read again the next time.
        if let Some(stamp) = before.filter(|stamp| Stamp::of(&path) == Some(*stamp)) {
            self.known.lock().unwrap_or_else(PoisonError::into_inner).insert(path, (stamp, digest));
        }
        Ok(digest)
    }

    fn read_digest(path: &Path, place: Place) -> Result<Digest, String> {
        let file = open(path, place.bytes_max())?;
        let mut hash = Sha256::new();
        let mut part = vec![0; 64 << 10];
        let mut reader = file.take(place.bytes_max());
        loop {
            match reader.read(&mut part) {
                Ok(0) => return Ok(Digest(hash.finalize().into())),
                Ok(read) => hash.update(part.get(..read).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
            }
        }
    }

    /// Loads a model: exactly the file that is meant. Reads and computes: not for an executor's thread.
    pub(crate) fn load(&self, model: &Model, net: Arc<dyn Net>) -> Result<Backend, String> {
        let (path, place) = self.find(&model.id)?;
        let shown = path.display();
        let bytes = read_whole(&path, place.bytes_max())?;
        let digest = Digest(Sha256::digest(&bytes).into());
        if let Some(named) = model.digest.filter(|named| *named != digest) {
            let (has, named) = (digest.short(), named.short());
            return Err(format!("{shown} has SHA-256 {has}…, the transaction named {named}…: the file differs from the coordinator's"));
        }
        let settings = self.settings(&model.id, place)?;
        let loaded = match place {
            // A file that nobody has tried before may find a panic in whatever reads it.
            Place::Here => catch_unwind(AssertUnwindSafe(|| Onnx::load(&model.id, digest, bytes, settings)))
                .unwrap_or_else(|panic| Err(format!("it cannot be read as an ONNX model: {}", said(panic.as_ref()))))
                .map(Backend::Onnx),
            Place::Server => Servers::parse(&bytes).map(|servers| Backend::Http(Upstream::new(servers, net))),
        };
        loaded.map_err(|why| format!("{shown}: {why}"))
    }

    fn settings(&self, id: &ModelId, place: Place) -> Result<Settings, String> {
        let Some(path) = self.has(&format!("{id}{SETTINGS_SUFFIX}.json")) else { return Ok(Settings::default()) };
        let shown = path.display();
        if place == Place::Server {
            return Err(format!("{shown} is there, and {id} is a model server: only models in the process have settings; remove it"));
        }
        Settings::read(&read_whole(&path, MODEL_SETTINGS_BYTES_MAX)?).map_err(|why| format!("{shown}: {why}"))
    }

    fn find(&self, id: &ModelId) -> Result<(PathBuf, Place), String> {
        let (onnx, json) = (format!("{id}.onnx"), format!("{id}.json"));
        // The settings of a model are nobody's model server.
        let server = Some(json.as_str()).filter(|_| !id.as_str().ends_with(SETTINGS_SUFFIX));
        match (self.has(&onnx), server.and_then(|json| self.has(json))) {
            (Some(path), None) => Ok((path, Place::Here)),
            (None, Some(path)) => Ok((path, Place::Server)),
            (None, None) => match server {
                Some(json) => Err(format!("model {id} is not in {} (neither {onnx} nor {json})", self.shown())),
                None => Err(format!("model {id} is not in {} (no {onnx}; a {json} holds the settings of another model)", self.shown())),
            },
            (Some(_), Some(_)) => Err(format!("model {id} is twice in {} ({onnx} and {json}); remove one of them", self.shown())),
        }
    }

    fn has(&self, name: &str) -> Option<PathBuf> {
        let path = self.dir.join(name);
        fs::symlink_metadata(&path).is_ok().then_some(path)
    }

    fn shown(&self) -> String {
        format!("{}/", self.dir.display().to_string().trim_end_matches('/'))
    }
}

impl Place {
    const fn bytes_max(self) -> u64 {
        match self {
            Place::Here => MODEL_BYTES_MAX,
            Place::Server => SERVER_FILE_BYTES_MAX,
        }
    }
}

/// All of a file, up to this size.
fn read_whole(path: &Path, bytes_max: u64) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let read = open(path, bytes_max)?.take(bytes_max).read_to_end(&mut bytes);
    read.map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
    Ok(bytes)
}

fn open(path: &Path, bytes_max: u64) -> Result<File, String> {
    let unreadable = |error: io::Error| format!("{} cannot be read: {error}", path.display());
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(format!("{} is not a file", path.display()));
    }
    if metadata.len() > bytes_max {
        return Err(format!("{} has {} bytes, over the {bytes_max} allowed", path.display(), metadata.len()));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gateway::net::AsyncStdNet;

    fn model(id: &str, digest: Option<Digest>) -> Model {
        Model { id: ModelId::new(id).unwrap(), digest }
    }

    fn refused(repository: &Repository, model: &Model) -> String {
        repository.load(model, Arc::new(AsyncStdNet)).unwrap_err()
    }

    #[test]
    fn a_model_that_is_missing_or_twice_is_refused_with_its_files() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path().join("models"));
        let shown = dir.path().join("models").display().to_string();
        let missing = format!("model digits-v9 is not in {shown}/ (neither digits-v9.onnx nor digits-v9.json)");
        assert_eq!(refused(&repository, &model("digits-v9", None)), missing);
        assert_eq!(repository.digest(&ModelId::new("digits-v9").unwrap()).unwrap_err(), missing);
        fs::create_dir(dir.path().join("models")).unwrap();
        for name in ["m.onnx", "m.json"] {
            fs::write(dir.path().join("models").join(name), "x").unwrap();
        }
        let twice = refused(&repository, &model("m", None));
        assert_eq!(twice, format!("model m is twice in {shown}/ (m.onnx and m.json); remove one of them"));
    }

    #[test]
    fn a_file_that_differs_from_the_coordinators_is_refused_with_both_digests() {
        let repository = Repository::new(PathBuf::from("models"));
        let id = ModelId::new("digits-v2").unwrap();
        let digest = repository.digest(&id).unwrap();
        repository.load(&model("digits-v2", Some(digest)), Arc::new(AsyncStdNet)).unwrap();
        let wrong = refused(&repository, &model("digits-v2", Some(Digest([0x98; 32]))));
        let has = digest.short();
        let said =
            format!("models/digits-v2.onnx has SHA-256 {has}…, the transaction named 98989898…: the file differs from the coordinator's");
        assert_eq!(wrong, said);
    }

    #[test]
    fn a_digest_is_read_once_and_again_when_the_file_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path().to_owned());
        let id = ModelId::new("m").unwrap();
        let write = |text: &str| {
            // As a deployment does it: the same name, another file.
            fs::write(dir.path().join("new"), text).unwrap();
            fs::rename(dir.path().join("new"), dir.path().join("m.onnx")).unwrap();
        };
        write("one");
        assert_eq!(repository.known_digest(&id), None);
        let one = repository.digest(&id).unwrap();
        assert_eq!(repository.known_digest(&id), Some(one));
        write("two");
        assert_eq!(repository.known_digest(&id), None);
        assert_ne!(repository.digest(&id).unwrap(), one);
    }

    #[test]
    fn a_file_that_is_no_model_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path().to_owned());
        let whole = fs::read("models/digits-v2.onnx").unwrap();
        fs::write(dir.path().join("torn.onnx"), &whole[..whole.len() / 2]).unwrap();
        fs::write(dir.path().join("noise.onnx"), [0xff; 99]).unwrap();
        fs::write(dir.path().join("empty.onnx"), []).unwrap();
        for id in ["torn", "noise", "empty"] {
            let refused = refused(&repository, &model(id, None));
            assert!(refused.contains(&format!("{id}.onnx: it ")), "{refused}");
        }
        fs::create_dir(dir.path().join("folder.onnx")).unwrap();
        assert!(refused(&repository, &model("folder", None)).ends_with("folder.onnx is not a file"));
    }

    #[test]
    fn a_models_settings_are_read_with_it_and_are_no_model_and_no_part_of_one() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path().to_owned());
        fs::copy("models/digits-v2.onnx", dir.path().join("m.onnx")).unwrap();
        let digest = repository.digest(&ModelId::new("m").unwrap()).unwrap();
        fs::write(dir.path().join("m.config.json"), r#"{"batch_rows_max": 8}"#).unwrap();
        assert!(matches!(repository.load(&model("m", Some(digest)), Arc::new(AsyncStdNet)), Ok(Backend::Onnx(_))));
        let taken = refused(&repository, &model("m.config", None));
        assert!(taken.ends_with("(no m.config.onnx; a m.config.json holds the settings of another model)"), "{taken}");
        fs::write(dir.path().join("m.config.json"), r#"{"batch": 8}"#).unwrap();
        let wrong = refused(&repository, &model("m", Some(digest)));
        assert!(wrong.contains("m.config.json: unknown field `batch`"), "{wrong}");
        fs::copy("models/digits-v1.onnx", dir.path().join("m.config.onnx")).unwrap();
        assert!(repository.load(&model("m.config", None), Arc::new(AsyncStdNet)).is_ok(), "a model in the process may be called so");
        fs::write(dir.path().join("s.json"), r#"{"http": "http://127.0.0.1:9001"}"#).unwrap();
        fs::write(dir.path().join("s.config.json"), "{}").unwrap();
        assert!(refused(&repository, &model("s", None)).contains("s.config.json is there, and s is a model server"));
    }

    #[test]
    fn a_model_servers_file_is_read_strictly() {
        let dir = tempfile::tempdir().unwrap();
        let repository = Repository::new(dir.path().to_owned());
        let load = |text: &str| {
            fs::write(dir.path().join("s.json"), text).unwrap();
            repository.load(&model("s", None), Arc::new(AsyncStdNet))
        };
        for good in [
            r#"{"http": "http://127.0.0.1:9001"}"#,
            r#"{"http": "http://models.example/v2/models/m/infer", "timeout_ms": 500}"#,
            r#"{"http": "http://[::1]:9001/"}"#,
            r#"{"http": ["http://127.0.0.1:9001", "http://127.0.0.1:9002"], "in_flight_max": 16}"#,
        ] {
            assert!(matches!(load(good), Ok(Backend::Http(_))), "{good}");
        }
        for (bad, why) in [
            (r#"{"http": "http://h", "tries": 3}"#, "tries: unknown field `tries`, expected one of `http`, `timeout_ms`, "),
            (r#"{"timeout_ms": 5}"#, "missing field `http`"),
            (r#"{"http": "http://h", "timeout_ms": 0}"#, "timeout_ms is 0; it may be 1 to 3600000"),
            (r#"{"http": "https://h"}"#, "https is not spoken"),
            (r#"{"http": "h:80"}"#, "must begin with http://"),
            (r#"{"http": "http://user@h"}"#, "user name"),
            (r#"{"http": "http://h/p?q=1"}"#, "no '?' or '#'"),
            (r#"{"http": "http://h:99999"}"#, "port"),
            (r#"{"http": ""}"#, "is not the address of a model server"),
            ("{", "EOF"),
        ] {
            let refused = load(bad).unwrap_err();
            assert!(refused.contains(why) && refused.contains("s.json: "), "{bad}: {refused}");
        }
    }
}
