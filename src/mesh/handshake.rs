//! Who may have a link, and who is refused and why.
//!
//! dialler → `hello`; listener → `hello` or `refused`; dialler → `welcome` or `refused`. The dialler's link is up when it has sent the
//! welcome, the listener's when it has read it. Whoever refuses says why before it closes.

use futures::{AsyncBufRead, AsyncWrite, AsyncWriteExt};
use serde::{Deserialize, Serialize};

use crate::core::ids::{DiskId, Incarnation, MeshId, NodeId, StateHash};
use crate::core::message::Message;
use crate::mesh::frame::{self, FrameError, HANDSHAKE_FRAME_BYTES_MAX, Packet};

/// From the connection to the end of the handshake, in milliseconds.
pub const HANDSHAKE_MS_MAX: u64 = 2_000;
/// The first field of the first message. Never changes.
const MAGIC: &str = "canary-mesh";

/// Who this node is, for as long as its process lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The mesh it belongs to.
    pub mesh: MeshId,
    /// The hash of slot 0.
    pub genesis_hash: StateHash,
    /// Its id in peers.json.
    pub node: NodeId,
    /// This start of its process.
    pub incarnation: Incarnation,
    /// The disk its log is on.
    pub disk_id: DiskId,
}

/// An identity as it travels.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    magic: String,
    mesh: MeshId,
    genesis_hash: StateHash,
    /// The sender.
    pub(super) node: NodeId,
    /// This start of its process.
    pub(super) incarnation: Incarnation,
    /// The disk its log is on.
    pub(super) disk_id: DiskId,
}

impl From<&Identity> for Hello {
    fn from(identity: &Identity) -> Hello {
        let Identity { mesh, genesis_hash, node, incarnation, disk_id } = identity.clone();
        Hello { magic: MAGIC.to_owned(), mesh, genesis_hash, node, incarnation, disk_id }
    }
}

/// Why a node gets no link. Written for both ends, so it names both.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("it did not say {MAGIC:?}, but {0:?}: the control port is for nodes of canary-mesh only")]
    Magic(String),
    #[error("{theirs} belongs to mesh {their_mesh}, {ours} to mesh {our_mesh}: check the addresses and \"mesh\" in both peers.json")]
    WrongMesh { theirs: NodeId, their_mesh: MeshId, ours: NodeId, our_mesh: MeshId },
    #[error(
        "the two meshes began differently: {theirs} with {}, {ours} with {}; the first start of both needs the same genesis and peers, \
         and a node that comes later, or has lost its log, starts with `serve --join` and no log",
        their_genesis.short(),
        our_genesis.short()
    )]
    WrongGenesis { theirs: NodeId, their_genesis: StateHash, ours: NodeId, our_genesis: StateHash },
    #[error("{0} is the id of this node itself: each node needs an id of its own")]
    OwnId(NodeId),
    #[error("{theirs} is not in the peers.json of {ours}: add it there, or start it under an id that is")]
    UnknownId { theirs: NodeId, ours: NodeId },
    #[error("{theirs} dialled {ours}, but the lower id dials: check that the ids in both peers.json are the same")]
    WrongDirection { theirs: NodeId, ours: NodeId },
    #[error("{answered} answers at the address of {dialled}: check the control addresses in peers.json")]
    NotTheDialled { dialled: NodeId, answered: NodeId },
    #[error("another process already is {node} (disk {disk_id}, incarnation {incarnation}): stop one of the two")]
    Duplicate { node: NodeId, disk_id: DiskId, incarnation: Incarnation },
    #[error("cut by partitions in peers.json")]
    Cut,
}

/// What the receiver of a hello knows of its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Known {
    /// It is not in peers.json.
    No,
    /// It is in peers.json, but `partitions` cuts it off.
    Cut,
    /// It is in peers.json; with the identity at the other end of its present link, if there is one.
    Yes { linked: Option<(Incarnation, DiskId)> },
}

/// What both ends check.
fn check_identity(ours: &Identity, theirs: &Hello) -> Result<(), Refusal> {
    if theirs.magic != MAGIC {
        return Err(Refusal::Magic(frame::brief(&theirs.magic)));
    }
    let (their_node, our_node) = (theirs.node.clone(), ours.node.clone());
    if theirs.mesh != ours.mesh {
        let (their_mesh, our_mesh) = (theirs.mesh.clone(), ours.mesh.clone());
        return Err(Refusal::WrongMesh { theirs: their_node, their_mesh, ours: our_node, our_mesh });
    }
    if theirs.genesis_hash != ours.genesis_hash {
        let (their_genesis, our_genesis) = (theirs.genesis_hash, ours.genesis_hash);
        return Err(Refusal::WrongGenesis { theirs: their_node, their_genesis, ours: our_node, our_genesis });
    }
    if their_node == our_node { Err(Refusal::OwnId(our_node)) } else { Ok(()) }
}

/// What the dialler checks of who answers.
fn check_listener(ours: &Identity, theirs: &Hello, dialled: &NodeId) -> Result<(), Refusal> {
    check_identity(ours, theirs)?;
    if theirs.node == *dialled { Ok(()) } else { Err(Refusal::NotTheDialled { dialled: dialled.clone(), answered: theirs.node.clone() }) }
}

/// What the listener checks of who dials.
///
/// A process has one link to a peer at a time, so a second connection of the same process (same disk and incarnation), or of a later start
/// of it, says that the first is dead and takes its place. Any other one is a second process under the same id.
pub(super) fn check_dialler(ours: &Identity, theirs: &Hello, known: Known) -> Result<(), Refusal> {
    check_identity(ours, theirs)?;
    let linked = match known {
        Known::No => return Err(Refusal::UnknownId { theirs: theirs.node.clone(), ours: ours.node.clone() }),
        _ if theirs.node > ours.node => {
            return Err(Refusal::WrongDirection { theirs: theirs.node.clone(), ours: ours.node.clone() });
        }
        Known::Cut => return Err(Refusal::Cut),
        Known::Yes { linked } => linked,
    };
    match linked {
        Some((incarnation, disk_id)) if theirs.disk_id != disk_id || theirs.incarnation < incarnation => {
            Err(Refusal::Duplicate { node: theirs.node.clone(), disk_id, incarnation })
        }
        _ => Ok(()),
    }
}

/// A handshake that came to nothing.
#[derive(Debug)]
pub(super) struct Failed {
    /// Who the other end said it is, if it came so far.
    pub peer: Option<NodeId>,
    /// What was wrong.
    pub why: Why,
}

/// What was wrong with a handshake.
#[derive(Debug, thiserror::Error)]
pub(super) enum Why {
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    #[error("it refused this node: {0}")]
    RefusedByPeer(String),
    #[error("a message out of turn in the handshake")]
    OutOfTurn,
    #[error("{0}")]
    Frame(#[from] FrameError),
    #[error("no handshake within {HANDSHAKE_MS_MAX} ms")]
    TooSlow,
}

impl Why {
    /// Whether one of the two ends said no, rather than that the connection broke.
    pub fn is_refusal(&self) -> bool {
        match self {
            Why::Refused(_) | Why::RefusedByPeer(_) | Why::OutOfTurn => true,
            Why::Frame(error) => error.is_refusal(),
            Why::TooSlow => false,
        }
    }

    /// What to tell the other end, if it has not said it itself and is still there.
    fn farewell(&self) -> Option<String> {
        match self {
            Why::Refused(refusal) => Some(refusal.to_string()),
            Why::OutOfTurn => Some(self.to_string()),
            Why::Frame(error) if error.is_refusal() => Some(error.to_string()),
            Why::RefusedByPeer(_) | Why::Frame(_) | Why::TooSlow => None,
        }
    }
}

impl FrameError {
    /// Whether the other end sent something it must not send, rather than that the connection broke.
    fn is_refusal(&self) -> bool {
        matches!(self, FrameError::TooLarge { .. } | FrameError::Version { .. } | FrameError::Malformed(_))
    }
}

/// The dialler's side. Returns who answered.
pub(super) async fn dial<S>(stream: &mut S, ours: &Identity, dialled: &NodeId) -> Result<Hello, Failed>
where
    S: AsyncBufRead + AsyncWrite + Unpin,
{
    let outcome = async {
        write(stream, &Packet::Hello(ours.into())).await?;
        let Packet::Hello(theirs) = read(stream).await? else { return Err(Why::OutOfTurn) };
        check_listener(ours, &theirs, dialled)?;
        write(stream, &Packet::Welcome).await?;
        Ok(theirs)
    }
    .await;
    close(stream, outcome, Some(dialled.clone())).await
}

/// The listener's side. `admit` judges the hello. Returns who dialled.
pub(super) async fn accept<S>(stream: &mut S, ours: &Identity, admit: impl FnOnce(&Hello) -> Result<(), Refusal>) -> Result<Hello, Failed>
where
    S: AsyncBufRead + AsyncWrite + Unpin,
{
    let mut peer = None;
    let outcome = async {
        let Packet::Hello(theirs) = read(stream).await? else { return Err(Why::OutOfTurn) };
        peer = Some(theirs.node.clone());
        admit(&theirs)?;
        write(stream, &Packet::Hello(ours.into())).await?;
        match read(stream).await? {
            Packet::Welcome => Ok(theirs),
            _ => Err(Why::OutOfTurn),
        }
    }
    .await;
    close(stream, outcome, peer).await
}

/// Says why to the other end, if the handshake failed and it should know.
async fn close<S: AsyncWrite + Unpin>(stream: &mut S, outcome: Result<Hello, Why>, peer: Option<NodeId>) -> Result<Hello, Failed> {
    match outcome {
        Ok(theirs) => Ok(theirs),
        Err(why) => {
            if let Some(reason) = why.farewell() {
                // It may be gone already. Then nobody needs the reason.
                let _gone = write(stream, &Packet::Refused { reason }).await;
            }
            Err(Failed { peer, why })
        }
    }
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, packet: &Packet<&Message>) -> Result<(), FrameError> {
    stream.write_all(&frame::encode(packet)?).await?;
    Ok(stream.flush().await?)
}

async fn read<S: AsyncBufRead + Unpin>(stream: &mut S) -> Result<Packet<Message>, Why> {
    let body = frame::read(stream, HANDSHAKE_FRAME_BYTES_MAX).await?;
    match frame::decode(&body)? {
        Packet::Refused { reason } => Err(Why::RefusedByPeer(frame::brief(&reason))),
        packet => Ok(packet),
    }
}
