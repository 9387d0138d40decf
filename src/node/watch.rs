//! peers.json is read again when it changes; a bad file is refused, and the old one kept.

use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwap;
use async_std::channel::{Receiver, Sender};
use async_std::task;
use futures::future::{Either, select};
use log::Level;
use serde_json::json;

use crate::core::io::Input;
use crate::mesh::Mesh;
use crate::node::events::Events;
use crate::node::turns::Turn;
use crate::node::{ServeOptions, core_settings, mesh_config};
use crate::peers::{PeersError, PeersFile};

/// From one look at the file to the next. A look is one `stat`.
const LOOK_MS: u64 = 250;

/// What tells one version of a file from the next without reading it.
pub type Stamp = Option<(SystemTime, u64, u64)>;

/// The file's present stamp. To be taken before the file is read, so that a change in between is seen later.
pub fn stamp(options: &ServeOptions) -> Stamp {
    let meta = std::fs::metadata(&options.peers).ok()?;
    Some((meta.modified().ok()?, meta.len(), meta.ino()))
}

/// Looks for changes since `seen` until the node stops; `asked` asks for one at once, whatever the file looks like.
pub async fn watch(
    options: ServeOptions,
    mut seen: Stamp,
    peers: Arc<ArcSwap<PeersFile>>,
    mesh: Arc<Mesh>,
    turns: Sender<Turn>,
    events: Events,
    asked: Receiver<()>,
) {
    loop {
        let forced = match select(Box::pin(asked.recv()), Box::pin(task::sleep(Duration::from_millis(LOOK_MS)))).await {
            Either::Left((Ok(()), _)) => true,
            Either::Left((Err(_), _)) => return,
            Either::Right(_) => false,
        };
        let now = stamp(&options);
        if !forced && now == seen {
            continue;
        }
        seen = now;
        match read(&options, &peers.load()) {
            Ok(file) => {
                let cut: Vec<_> = mesh_config(&options.id, &file).cut.into_iter().collect();
                let nodes: Vec<_> = file.peers.iter().map(|peer| &peer.id).collect();
                events.say(Level::Info, "peers_read", json!({"nodes": nodes, "cut": cut}));
                mesh.configure(mesh_config(&options.id, &file));
                let settings = core_settings(&file);
                peers.store(Arc::new(file));
                if turns.send(Turn::Input(Input::Settings(settings))).await.is_err() {
                    return;
                }
            }
            Err(error) => events.say(Level::Error, "peers_refused", json!({"reason": error.to_string(), "kept": "the old one"})),
        }
    }
}

fn read(options: &ServeOptions, old: &PeersFile) -> Result<PeersFile, PeersError> {
    let file = PeersFile::load(&options.peers)?;
    file.check_member(&options.id)?;
    file.changes_live(old)?;
    Ok(file)
}
