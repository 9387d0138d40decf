//! Two ends over real sockets: nodes against nodes, and nodes against a peer that is played by hand.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use async_std::channel::{Receiver, bounded};
use async_std::future::timeout;
use async_std::task::block_on;

use super::*;
use crate::core::ballot::Ballot;
use crate::core::gate::{Counts, RouteEvidence};
use crate::core::ids::{Digest, MeshId, ModelId, RouteName, StateHash, TxId};
use crate::core::message::{
    AcceptAnswer, DigestEntry, Grant, Head, HealthSnapshot, Heartbeat, LeaseSummary, OpenSummary, PrepareAnswer, ResolveAnswer,
};
use crate::core::routes::{Neighbour, Start};
use crate::core::state::{CanaryChange, Change, Kind, MemberChange, Model, RouteChange, Transaction, Weights};
use crate::core::value::{Abort, AbortCause, CastVote, Commit, Decision, Value, Vote};
use crate::mesh::handshake::Hello;

/// Longer than anything may take on a busy machine.
const WAIT: Duration = Duration::from_secs(30);
/// Longer than any test: no link ends by silence unless the test is about that.
const NO_SILENCE_MS: u64 = 600_000;

fn id(name: &str) -> NodeId {
    NodeId::new(name).unwrap()
}

fn identity(name: &str) -> Identity {
    let mesh = MeshId::new("test").unwrap();
    Identity { mesh, genesis_hash: StateHash([1; 32]), node: id(name), incarnation: 1, disk_id: DiskId([7; 8]) }
}

/// peers.json of a node: ids and addresses.
fn config(peers: &[(&str, SocketAddr)]) -> MeshConfig {
    let peers = peers.iter().map(|(name, address)| PeerAddress { id: id(name), control: address.to_string() });
    MeshConfig { peers: peers.collect(), cut: BTreeSet::new(), silence_ms_max: NO_SILENCE_MS }
}

fn cut(config: &MeshConfig, name: &str) -> MeshConfig {
    MeshConfig { cut: [id(name)].into(), ..config.clone() }
}

fn fetch(from: u64) -> Message {
    Message::Fetch { from }
}

/// A message of about this many bytes.
fn large(bytes: usize) -> Message {
    Message::PrepareResp { slot: 1, ballot: ballot(), answer: PrepareAnswer::NotReady { reason: "x".repeat(bytes) } }
}

fn ballot() -> Ballot {
    Ballot { round: 3, node: id("b"), incarnation: 2 }
}

fn bind() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// An address where nobody listens: a port that ordinary processes may not take.
fn nowhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 1))
}

/// A mesh and what it has told. Every event is checked for its place.
struct Node {
    mesh: Mesh,
    events: Receiver<MeshEvent>,
    linked: BTreeMap<NodeId, Incarnation>,
}

impl Node {
    fn start(identity: Identity, listener: TcpListener, config: MeshConfig) -> Node {
        Node::start_with_room(identity, listener, config, 1_024)
    }

    /// With a thread that reads the links, and takes no more while this many events wait for the test.
    fn start_with_room(identity: Identity, listener: TcpListener, config: MeshConfig, events_max: usize) -> Node {
        let (sender, events) = bounded(events_max);
        let (mesh, mut inbox) = Mesh::start(identity, listener, config).unwrap();
        std::thread::spawn(move || {
            while !sender.is_closed() {
                let mut told = Vec::new();
                inbox.wait(WAIT, &mut told).unwrap();
                if told.into_iter().any(|event| block_on(sender.send(event)).is_err()) {
                    return;
                }
            }
        });
        Node { mesh, events, linked: BTreeMap::new() }
    }

    fn send(&self, to: &str, message: &Message) -> Result<(), FrameError> {
        Frame::new(message).map(|frame| self.mesh.send(&id(to), &frame))
    }

    fn next(&mut self, what: &str) -> MeshEvent {
        let event = block_on(timeout(WAIT, self.events.recv())).unwrap_or_else(|_| panic!("waited in vain for {what}")).unwrap();
        match &event {
            MeshEvent::LinkUp { peer, incarnation, .. } => assert_eq!(self.linked.insert(peer.clone(), *incarnation), None, "{event:?}"),
            MeshEvent::LinkDown { peer, incarnation, .. } => assert_eq!(self.linked.remove(peer), Some(*incarnation), "{event:?}"),
            MeshEvent::Message { from, incarnation, .. } => assert_eq!(self.linked.get(from), Some(incarnation), "{event:?}"),
            MeshEvent::Rerouted { peer, .. } => assert!(self.linked.contains_key(peer), "{event:?}"),
            MeshEvent::Refused { .. } => {}
        }
        event
    }

    /// Passes over all events up to the one that is wanted.
    fn until<T>(&mut self, what: &str, wanted: impl Fn(&MeshEvent) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(&self.next(what)) {
                return found;
            }
        }
    }

    fn up(&mut self, name: &str) -> Incarnation {
        self.until(&format!("a link to {name}"), |event| match event {
            MeshEvent::LinkUp { peer, incarnation, .. } if *peer == id(name) => Some(*incarnation),
            _ => None,
        })
    }

    fn down(&mut self, name: &str) -> String {
        self.until(&format!("the end of the link to {name}"), |event| match event {
            MeshEvent::LinkDown { peer, reason, .. } if *peer == id(name) => Some(reason.clone()),
            _ => None,
        })
    }

    /// Waits until messages to a peer go another way: over the node that it says, or directly.
    fn rerouted(&mut self, name: &str) -> Option<NodeId> {
        self.until(&format!("another way to {name}"), |event| match event {
            MeshEvent::Rerouted { peer, over } if *peer == id(name) => Some(over.clone()),
            _ => None,
        })
    }

    fn refused(&mut self) -> (Option<NodeId>, String) {
        self.until("a refusal", |event| match event {
            MeshEvent::Refused { peer, reason } => Some((peer.clone(), reason.clone())),
            _ => None,
        })
    }

    fn message(&mut self) -> Message {
        self.until("a message", |event| match event {
            MeshEvent::Message { message, .. } => Some(message.clone()),
            _ => None,
        })
    }

    fn status(&self, name: &str) -> LinkStatus {
        self.mesh.links()[&id(name)].clone()
    }

    /// Waits until it has passed on, and dropped, so many messages between others. They are counted when they are sent.
    fn has_passed_on(&self, messages: (u64, u64)) {
        let since = Instant::now();
        while self.mesh.passed_on() != messages {
            assert!(since.elapsed() < WAIT, "waited in vain for {messages:?}: {:?}", self.mesh.passed_on());
            std::thread::yield_now();
        }
    }

    /// Waits until the link to a peer stands like this.
    fn stands(&self, name: &str, state: LinkWord) -> LinkStatus {
        let since = Instant::now();
        loop {
            let status = self.status(name);
            if status.state == state {
                return status;
            }
            assert!(since.elapsed() < WAIT, "waited in vain for {state:?}: {status:?}");
            std::thread::yield_now();
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.events.close();
        block_on(self.mesh.stop());
    }
}

/// `a`, which dials, and `b`, which listens; linked.
fn pair() -> (Node, Node, MeshConfig) {
    let ((for_a, at_a), (for_b, at_b)) = (bind(), bind());
    let both = config(&[("a", at_a), ("b", at_b)]);
    let mut a = Node::start(identity("a"), for_a, both.clone());
    let mut b = Node::start(identity("b"), for_b, both.clone());
    a.up("b");
    b.up("a");
    (a, b, both)
}

/// A peer played by hand, and its name for the connection.
struct Hand(TcpStream, u64);

impl Hand {
    fn dial(address: SocketAddr) -> Hand {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(WAIT)).unwrap();
        Hand(stream, 0)
    }

    fn write(&mut self, packet: &Packet<&Message>) {
        self.0.write_all(&frame::encode(packet).unwrap()).unwrap();
    }

    /// The next packet; `None` at the end of the connection.
    fn read(&mut self) -> Option<Packet<Message>> {
        let mut length = [0; 4];
        self.0.read_exact(&mut length).ok()?;
        let mut body = vec![0; u32::from_be_bytes(length) as usize];
        self.0.read_exact(&mut body).unwrap();
        Some(frame::decode(&body).unwrap())
    }

    fn greet(&mut self, identity: &Identity) {
        let hello = Hello::from(identity);
        self.1 = hello.connection;
        self.write(&Packet::Hello(hello));
    }

    /// Dials and shakes hands like a node.
    fn link(address: SocketAddr, identity: &Identity) -> Hand {
        let mut hand = Hand::dial(address);
        hand.greet(identity);
        assert!(matches!(hand.read(), Some(Packet::Hello(_))));
        hand.write(&Packet::Welcome);
        hand
    }

    /// The reason that the node gives before it closes.
    fn told(&mut self) -> String {
        let Some(Packet::Refused { reason }) = self.read() else { panic!("no reason") };
        assert_eq!(self.read(), None, "the reason comes last");
        reason
    }
}

/// A node `b` that knows `a` and `c`, and its address.
fn listener_b() -> (Node, SocketAddr) {
    let (listener, address) = bind();
    (Node::start(identity("b"), listener, config(&[("a", nowhere()), ("b", address)])), address)
}

#[test]
fn messages_arrive_in_order_and_once_in_both_directions() {
    let (mut a, mut b, _) = pair();
    for number in 0..4_000 {
        a.send("b", &fetch(number)).unwrap();
        b.send("a", &fetch(number)).unwrap();
    }
    for number in 0..4_000 {
        assert_eq!(a.message(), fetch(number));
        assert_eq!(b.message(), fetch(number));
    }
    let (there, here) = (a.status("b"), b.status("a"));
    assert_eq!((there.state, there.messages_sent, here.messages_sent, there.queue_bytes), (LinkWord::Up, 4_000, 4_000, 0));
    assert_eq!(there.bytes_sent, here.bytes_received);
    block_on(b.mesh.stop());
    let reason = a.down("b");
    assert!(reason.contains("127.0.0.1:") && reason.contains("clos"), "{reason}");
}

fn transaction(change: Change) -> Transaction {
    Transaction { txid: TxId { node: id("a"), incarnation: 1, counter: 9 }, kind: Kind::Advance, change, idempotency_key: Some("k".into()) }
}

/// One message of every kind, and of every kind of answer.
fn messages() -> Vec<Message> {
    let model = Model { id: ModelId::new("v2").unwrap(), digest: Some(Digest([5; 32])) };
    let route = RouteChange { stable: None, canary: CanaryChange::Set(model), weights: Some(Weights::with_canary(1_000).unwrap()) };
    let routes = transaction(Change::Routes([(RouteName::new("default").unwrap(), route)].into()));
    let members = transaction(Change::Members(MemberChange::Add { node: id("d"), disk_id: DiskId([4; 8]) }));
    let counts = Counts { requests: 1, bad: 2, p50_us: 3, p99_us: u64::MAX };
    let evidence =
        RouteEvidence { route: RouteName::new("default").unwrap(), canary_model_id: None, stable: counts, canary: counts, trial: None };
    let vote = Vote { yes: false, reason: Some("no model ü".into()), evidence: vec![evidence.clone()] };
    let votes = vec![CastVote { node: id("c"), vote: vote.clone() }];
    let hash = StateHash([9; 32]);
    let commit = Value::Commit(Commit { tx: routes.clone(), state_hash: hash, votes: votes.clone(), excused: vec![id("c")], at: 1 });
    let causes = [
        AbortCause::Vetoed(vec![id("c")]),
        AbortCause::NoVote(BTreeMap::new()),
        AbortCause::Busy(routes.txid.clone()),
        AbortCause::NoMajority(vec![id("a")]),
        AbortCause::Preempted(None),
        AbortCause::CoordinatorLost,
        AbortCause::SlotTaken,
        AbortCause::NotReady("why".into()),
        AbortCause::Invalid("why".into()),
    ];
    let aborts =
        causes.map(|cause| Value::Abort(Abort { txid: None, kind: Some(Kind::Reduce), cause, votes: votes.clone(), at: u64::MAX }));
    let decision = |value: Value| Decision { slot: 4, value, version: 2, state_hash: hash };
    let head = Head { slot: 3, version: 2, state_hash: hash };
    let (slot, promised) = (4, ballot());
    let open = Some(OpenSummary { slot, promised: Some(ballot()), prepared: Some(routes.txid.clone()), accepted: true });
    let health = HealthSnapshot { reasons: vec!["slow".into()], routes: vec![evidence] };
    let lease = LeaseSummary { asks: true, grants_ms: 6_000, fenced: vec![id("c")] };
    let digest = vec![DigestEntry { node: id("c"), incarnation: 1, beat: 2, head: 3 }];
    let prepare = |answer| Message::PrepareResp { slot, ballot: ballot(), answer };
    let accept = |answer| Message::AcceptResp { slot, ballot: ballot(), answer };
    let resolve = |answer| Message::ResolveResp { slot, ballot: ballot(), answer };
    let mut messages = vec![
        Message::PrepareReq { slot, ballot: ballot(), tx: routes.clone(), base_hash: hash },
        Message::PrepareReq { slot, ballot: ballot(), tx: members.clone(), base_hash: hash },
        prepare(PrepareAnswer::Voted { vote, accepted: Some((ballot(), commit.clone())), fenced: vec![id("x")] }),
        prepare(PrepareAnswer::Busy { holder: routes.txid.clone() }),
        prepare(PrepareAnswer::Rejected { promised: promised.clone() }),
        prepare(PrepareAnswer::NotReady { reason: "catching up".into() }),
        Message::AcceptReq { slot, ballot: ballot(), value: commit.clone() },
        accept(AcceptAnswer::Accepted),
        accept(AcceptAnswer::Rejected { promised: promised.clone() }),
        Message::Decision { decision: decision(commit.clone()) },
        Message::ResolveReq { slot, ballot: ballot() },
        resolve(ResolveAnswer::Promised { accepted: None, prepared: Some(members) }),
        resolve(ResolveAnswer::Rejected { promised }),
        Message::Heartbeat(Heartbeat {
            beat: 7,
            head,
            kept: 2,
            open,
            unrecorded: true,
            lease,
            health: health.clone(),
            digest: digest.clone(),
        }),
        Message::Heartbeat(Heartbeat::bare(7, head)),
        fetch(u64::MAX),
        Message::Decisions { decisions: aborts.into_iter().chain([commit]).map(decision).collect() },
        Message::Grant(Grant { incarnation: 2, beat: 7, lease_ms: 6_000 }),
        Message::Pinned { disk_id: DiskId([3; 8]) },
    ];
    // A kind that is added to the protocol does not compile here until it is added above.
    messages.iter().for_each(|message| match message {
        Message::PrepareReq { .. } | Message::PrepareResp { .. } | Message::AcceptReq { .. } | Message::AcceptResp { .. } => {}
        Message::Decision { .. } | Message::ResolveReq { .. } | Message::ResolveResp { .. } | Message::Heartbeat(_) => {}
        Message::Fetch { .. } | Message::Decisions { .. } | Message::Grant(_) | Message::Snapshot(_) | Message::Pinned { .. } => {}
    });
    messages.push(fetch(0));
    messages
}

#[test]
fn a_message_of_every_kind_arrives_as_it_was_sent() {
    let (a, mut b, _) = pair();
    for message in messages() {
        a.send("b", &message).unwrap();
        assert_eq!(b.message(), message);
    }
}

#[test]
fn the_largest_frame_passes_and_a_larger_message_is_an_error_that_costs_no_link() {
    let (a, mut b, _) = pair();
    let around = frame::encode(&Packet::Message(&large(100_000))).unwrap().len() - 4 - 100_000;
    let over = a.send("b", &large(MESSAGE_BYTES_MAX - around + 1)).unwrap_err();
    assert_eq!(over.to_string(), "a frame of 1048321 bytes is over the limit of 1048320");
    let largest = large(MESSAGE_BYTES_MAX - around);
    for _ in 0..3 {
        a.send("b", &largest).unwrap();
    }
    for _ in 0..3 {
        assert!(b.message() == largest);
    }
}

#[test]
fn a_node_is_refused_with_the_reason_on_both_sides() {
    let other_mesh = Identity { mesh: MeshId::new("prod").unwrap(), ..identity("a") };
    let other_genesis = Identity { genesis_hash: StateHash([2; 32]), ..identity("a") };
    let cases = [
        (other_mesh, "a belongs to mesh prod, b to mesh test: check the addresses and \"mesh\" in both peers.json"),
        (
            other_genesis,
            "the two meshes began differently: a with 02020202, b with 01010101; the first start of both needs the same genesis and peers, \
             and a node that comes later, or has lost its log, starts with `serve --join` and no log",
        ),
        (identity("aa"), "aa is not in the peers.json of b: add it there, or start it under an id that is"),
    ];
    for (dialler, reason) in cases {
        let (mut b, at_b) = listener_b();
        let name = dialler.node.clone();
        let mut a = Node::start(dialler, bind().0, config(&[("b", at_b)]));
        let (peer, said) = a.refused();
        assert_eq!((peer, said), (Some(id("b")), format!("{at_b}: it refused this node: {reason}")));
        let (peer, said) = b.refused();
        assert_eq!(peer, Some(name.clone()));
        assert!(said.starts_with("127.0.0.1:") && said.ends_with(&format!(": refused: {reason}")), "{said}");
        let status = a.stands("b", LinkWord::Refused);
        assert!(status.reason.unwrap().ends_with(reason));
        if name == id("a") {
            assert!(b.stands("a", LinkWord::Refused).reason.unwrap().ends_with(reason));
        }
    }
}

#[test]
fn a_listener_that_is_not_the_one_dialled_is_refused_with_the_reason_on_both_sides() {
    let (mut b, at_b) = listener_b();
    let mut a = Node::start(identity("a"), bind().0, config(&[("c", at_b)]));
    let reason = "b answers at the address of c: check the control addresses in peers.json";
    assert_eq!(a.refused(), (Some(id("c")), format!("{at_b}: refused: {reason}")));
    let (peer, said) = b.refused();
    assert_eq!(peer, Some(id("a")));
    assert!(said.ends_with(&format!("it refused this node: {reason}")), "{said}");
    assert_eq!(a.stands("c", LinkWord::Refused).state, b.stands("a", LinkWord::Refused).state);
}

#[test]
fn an_id_that_must_not_dial_is_refused() {
    let (listener, at_b) = bind();
    let mut b = Node::start(identity("b"), listener, config(&[("a", nowhere()), ("c", nowhere())]));
    for (name, reason) in [
        ("c", "c dialled b, but the lower id dials: check that the ids in both peers.json are the same"),
        ("b", "b is the id of this node itself: each node needs an id of its own"),
    ] {
        let mut hand = Hand::dial(at_b);
        hand.greet(&identity(name));
        assert_eq!(hand.told(), reason);
        let (peer, said) = b.refused();
        assert!(peer == Some(id(name)) && said.ends_with(reason), "{said}");
    }
}

#[test]
fn a_second_process_of_a_linked_node_is_refused_and_the_same_one_replaces_its_link() {
    let (mut b, at_b) = listener_b();
    let first = Identity { incarnation: 5, ..identity("a") };
    let mut held = Hand::link(at_b, &first);
    assert_eq!(b.up("a"), 5);
    let elsewhere = Identity { disk_id: DiskId([8; 8]), incarnation: 6, ..first.clone() };
    for second in [elsewhere, Identity { incarnation: 4, ..first.clone() }] {
        let mut hand = Hand::dial(at_b);
        hand.greet(&second);
        assert_eq!(hand.told(), "another process already is a (disk 0707070707070707, incarnation 5): stop one of the two");
        assert!(b.refused().1.contains("another process already is a"));
    }
    held.write(&Packet::Message(&fetch(1)));
    assert_eq!(b.message(), fetch(1), "the first link has not noticed");
    for incarnation in [5, 6] {
        let mut next = Hand::link(at_b, &Identity { incarnation, ..first.clone() });
        assert_eq!(b.down("a"), "replaced by a newer connection of the same peer");
        assert_eq!(b.up("a"), incarnation);
        assert_eq!(held.read(), None, "the old connection is closed");
        next.write(&Packet::Message(&fetch(incarnation)));
        assert_eq!(b.message(), fetch(incarnation));
        held = next;
    }
}

#[test]
fn bytes_that_are_no_handshake_are_refused_by_address_and_the_node_goes_on() {
    let (mut b, at_b) = listener_b();
    let hello = frame::encode(&Packet::Hello(Hello::from(&identity("a")))).unwrap();
    let mut other_version = hello.clone();
    other_version[5] = 9;
    let mut other_magic = hello.clone();
    let at = hello.windows(11).position(|window| window == b"canary-mesh").unwrap();
    other_magic[at] = b'C';
    let cases: [(&[u8], &str); 8] = [
        (b"GET / HTTP/1.1\r\n\r\n", "a frame of 1195725856 bytes is over the limit of 4096"),
        (&[0, 0, 0x10, 1], "a frame of 4097 bytes is over the limit of 4096"),
        (&[0, 0, 0, 3, 1, 2, 3], "not a message of this protocol: it does not begin with a version"),
        (&[0, 0, 0, 0], "not a message of this protocol: it does not begin with a version"),
        (&[0, 0, 0, 3, 0x92, PROTOCOL_VERSION, 0xc1], "not a message of this protocol"),
        (&other_version, "protocol version 9 there and 2 here: run the same release on both"),
        (&other_magic, "it did not say \"canary-mesh\", but \"Canary-mesh\""),
        (&frame::encode(&Packet::Message(&fetch(1))).unwrap(), "a message out of turn in the handshake"),
    ];
    for (bytes, reason) in cases {
        let mut hand = Hand::dial(at_b);
        hand.0.write_all(bytes).unwrap();
        let told = hand.told();
        assert!(told.contains(reason), "{told}");
        let (_, said) = b.refused();
        let from = hand.0.local_addr().unwrap();
        assert!(said.starts_with(&format!("{from}: ")) && said.contains(reason), "{said}");
    }
    for (bytes, reason) in [(&hello[..0], "closed the connection"), (&hello[..20], "closed the connection in the middle of a frame")] {
        let mut hand = Hand::dial(at_b);
        hand.0.write_all(bytes).unwrap();
        let from = hand.0.local_addr().unwrap();
        drop(hand);
        assert_eq!(b.refused().1, format!("{from}: {reason}"));
    }
    Hand::link(at_b, &identity("a"));
    b.up("a");
}

#[test]
fn connections_that_say_nothing_are_closed_and_keep_nobody_out() {
    let (mut b, at_b) = listener_b();
    let mut silent: Vec<_> = (0..UNAUTHENTICATED_MAX + 1).map(|_| Hand::dial(at_b)).collect();
    // One says something, but never all of it.
    silent[0].0.write_all(&[0, 0]).unwrap();
    let mut a = Node::start(identity("a"), bind().0, config(&[("b", at_b)]));
    let (mut closed, mut linked) = (0, false);
    while closed < silent.len() || !linked {
        match b.next("the silent to be closed, and a to be linked") {
            // While all places are taken, the dialler may find it takes too long and come back.
            MeshEvent::Refused { reason, .. } if reason.ends_with("no handshake within 2000 ms") => closed += 1,
            event => linked |= matches!(event, MeshEvent::LinkUp { .. }),
        }
    }
    a.up("b");
    assert!(silent.iter_mut().all(|hand| hand.read().is_none()));
}

#[test]
fn what_does_not_belong_on_a_link_ends_it_with_address_and_reason() {
    let (mut b, at_b) = listener_b();
    let mut old_version = frame::encode(&Packet::Message(&fetch(1))).unwrap();
    old_version[5] = 0;
    let cases: [(&[u8], &str); 5] = [
        (&[0, 0x10, 0, 1], "a frame of 1048577 bytes is over the limit of 1048576"),
        (&[0, 0, 0, 1, 0xc1], "not a message of this protocol: it does not begin with a version"),
        (&old_version, "protocol version 0 there and 2 here: run the same release on both"),
        (&frame::encode(&Packet::Welcome).unwrap(), "a message out of turn"),
        (&[0, 0, 0, 9, 0x92], "closed the connection in the middle of a frame"),
    ];
    for (bytes, reason) in cases {
        let mut hand = Hand::link(at_b, &identity("a"));
        b.up("a");
        hand.write(&Packet::Message(&fetch(3)));
        hand.0.write_all(bytes).unwrap();
        hand.0.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(b.next("a message"), MeshEvent::Message { from: id("a"), incarnation: 1, message: fetch(3) });
        assert_eq!(b.down("a"), format!("{}: {reason}", hand.0.local_addr().unwrap()));
        assert_eq!(hand.read(), None);
        assert!(b.stands("a", LinkWord::Down).reason.unwrap().ends_with(reason));
    }
}

#[test]
fn a_link_that_falls_silent_is_closed_even_within_a_frame() {
    let (listener, at_b) = bind();
    let config = MeshConfig { silence_ms_max: 200, ..config(&[("a", nowhere())]) };
    let mut b = Node::start(identity("b"), listener, config);
    for said in [&[][..], &[0, 0, 0, 9, 0x92]] {
        let mut hand = Hand::link(at_b, &identity("a"));
        hand.0.write_all(said).unwrap();
        b.up("a");
        assert_eq!(b.down("a"), format!("{}: no message for 200 ms", hand.0.local_addr().unwrap()));
        assert_eq!(hand.read(), None);
    }
}

#[test]
fn a_node_that_is_slow_itself_does_not_blame_its_peer() {
    let (listener, at_b) = bind();
    let config = MeshConfig { silence_ms_max: 1_000, ..config(&[("a", nowhere())]) };
    let mut b = Node::start_with_room(identity("b"), listener, config, 1);
    let mut hand = Hand::link(at_b, &identity("a"));
    let two = [fetch(0), fetch(1)].map(|message| frame::encode(&Packet::Message(&message)).unwrap()).concat();
    hand.0.write_all(&two).unwrap();
    // The second has no room while the first waits: nothing more is read.
    let since = Instant::now();
    while b.status("a").messages_received < 2 {
        assert!(since.elapsed() < WAIT, "waited in vain for the first messages");
        std::thread::yield_now();
    }
    for number in 2..20 {
        hand.write(&Packet::Message(&fetch(number)));
    }
    // This is the slowness: nobody takes the events for twice the silence that is allowed.
    std::thread::sleep(Duration::from_millis(2_000));
    b.up("a");
    for number in 0..20 {
        assert_eq!(b.next("a message"), MeshEvent::Message { from: id("a"), incarnation: 1, message: fetch(number) });
    }
}

#[test]
fn a_node_takes_no_more_from_its_peers_than_it_can_hand_on() {
    let (listener, at_b) = bind();
    let _b = Node::start_with_room(identity("b"), listener, config(&[("a", nowhere())]), 4);
    let mut hand = Hand::link(at_b, &identity("a"));
    hand.0.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
    let frame = frame::encode(&Packet::Message(&large(64 * 1024))).unwrap();
    // 64 MiB is far beyond what the kernel buffers: if they all go, they are in the node's memory.
    let taken = (0..1_024).take_while(|_| hand.0.write_all(&frame).is_ok()).count();
    assert!(taken < 1_024, "all {taken} messages were taken");
}

#[test]
fn what_comes_in_one_piece_with_the_handshake_is_handed_on_without_waiting_for_more() {
    let (mut b, at_b) = listener_b();
    let mut hand = Hand::dial(at_b);
    hand.greet(&identity("a"));
    assert!(matches!(hand.read(), Some(Packet::Hello(_))));
    let packets = [Packet::Welcome, Packet::Message(&fetch(1)), Packet::Message(&fetch(2))];
    let mut bytes: Vec<_> = packets.iter().flat_map(|packet| frame::encode(packet).unwrap()).collect();
    let last = bytes.pop().unwrap();
    hand.0.write_all(&bytes).unwrap();
    b.up("a");
    assert_eq!(b.message(), fetch(1));
    hand.0.write_all(&[last]).unwrap();
    assert_eq!(b.message(), fetch(2));
}

#[test]
fn a_stopped_mesh_closes_its_links_and_so_does_a_dropped_inbox() {
    for stop in [true, false] {
        let (listener, at_b) = bind();
        let (mesh, mut inbox) = Mesh::start(identity("b"), listener, config(&[("a", nowhere())])).unwrap();
        let mut hand = Hand::link(at_b, &identity("a"));
        let mut told = Vec::new();
        while !matches!(told.last(), Some(MeshEvent::LinkUp { .. })) {
            inbox.wait(WAIT, &mut told).unwrap();
        }
        if stop {
            block_on(mesh.stop());
            inbox.wait(WAIT, &mut told).unwrap();
        } else {
            drop(inbox);
        }
        assert_eq!(hand.read(), None);
    }
}

#[test]
fn a_wait_ends_when_somebody_wakes_it_even_before_it_begins() {
    let (_mesh, mut inbox) = Mesh::start(identity("b"), bind().0, config(&[])).unwrap();
    let (waker, mut told) = (inbox.waker(), Vec::new());
    waker.wake_by_ref();
    // Without the call this would last longer than the test may.
    inbox.wait(10 * WAIT, &mut told).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| waker.wake_by_ref());
        inbox.wait(10 * WAIT, &mut told).unwrap();
    });
    assert_eq!(told, []);
}

#[test]
fn a_peer_that_never_reads_loses_its_link_and_memory_stays_bounded() {
    for (bytes, sends_max) in [(1_000_000, 1_000), (10, 1_000_000)] {
        let (mut b, at_b) = listener_b();
        let hand = Hand::link(at_b, &identity("a"));
        b.up("a");
        let message = large(bytes);
        let mut queued_most = 0;
        for _ in 0..sends_max {
            b.send("a", &message).unwrap();
            let status = b.status("a");
            queued_most = queued_most.max(status.queue_bytes);
            if status.state != LinkWord::Up {
                break;
            }
        }
        let reason = b.down("a");
        let address = hand.0.local_addr().unwrap();
        assert!(reason.starts_with(&format!("{address} is too slow: ")), "{reason}");
        assert!(queued_most > 0 && queued_most <= QUEUE_BYTES_MAX, "{queued_most} bytes were queued");
        assert_eq!(b.status("a").queue_bytes, 0);
    }
}

#[test]
fn what_is_queued_for_a_peer_is_sent_when_it_reads_again() {
    let (mut b, at_b) = listener_b();
    let mut hand = Hand::link(at_b, &identity("a"));
    b.up("a");
    let mut sent = 0;
    while b.status("a").queue_bytes < QUEUE_BYTES_MAX / 2 {
        b.send("a", &Message::Decisions { decisions: vec![] }).unwrap();
        b.send("a", &large(500_000)).unwrap();
        sent += 2;
    }
    for number in 0..sent {
        let expected = if number % 2 == 0 { Message::Decisions { decisions: vec![] } } else { large(500_000) };
        assert!(hand.read() == Some(Packet::Message(expected)), "message {number}");
    }
    assert_eq!(b.stands("a", LinkWord::Up).queue_bytes, 0);
}

#[test]
fn a_cut_closes_the_link_at_once_and_a_heal_brings_it_back() {
    let (mut a, mut b, both) = pair();
    // The listener cuts: the dialler is told why, whenever it tries.
    b.mesh.configure(cut(&both, "a"));
    assert_eq!(b.down("a"), "cut by partitions in peers.json");
    assert_eq!(b.status("a").state, LinkWord::Cut);
    a.down("b");
    assert!(a.refused().1.ends_with("it refused this node: cut by partitions in peers.json"));
    assert!(b.refused().1.ends_with("refused: cut by partitions in peers.json"));
    assert_eq!(a.stands("b", LinkWord::Refused).state, LinkWord::Refused);
    b.mesh.configure(both.clone());
    a.up("b");
    b.up("a");
    // The dialler cuts: it does not even try.
    a.mesh.configure(cut(&both, "b"));
    assert_eq!(a.down("b"), "cut by partitions in peers.json");
    b.down("a");
    assert_eq!(a.status("b").reason.as_deref(), Some("cut by partitions in peers.json"));
    a.mesh.configure(both);
    a.up("b");
    b.up("a");
    a.send("b", &fetch(1)).unwrap();
    assert_eq!(b.message(), fetch(1));
}

#[test]
fn links_that_come_and_go_quickly_keep_their_events_in_order() {
    let (mut a, mut b, both) = pair();
    for number in 0..100 {
        let (one, peer) = if number % 3 == 0 { (&b, "a") } else { (&a, "b") };
        one.mesh.configure(cut(&both, peer));
        a.send("b", &fetch(number)).unwrap();
        one.mesh.configure(both.clone());
        // A link or none, either will do.
        b.send("a", &fetch(number)).unwrap();
        if number % 10 == 0 {
            a.stands("b", LinkWord::Up);
        }
    }
    // Until the last one has settled, either end may still lose it: so it is said until it is heard.
    let (last, since) = (fetch(1_000), Instant::now());
    loop {
        assert!(since.elapsed() < WAIT, "waited in vain for the last message");
        a.send("b", &last).unwrap();
        while !a.events.is_empty() {
            a.next("whatever happened");
        }
        while !b.events.is_empty() {
            if matches!(b.next("the last message"), MeshEvent::Message { message, .. } if message == last) {
                return;
            }
        }
        std::thread::yield_now();
    }
}

#[test]
fn a_node_that_dies_and_starts_again_is_linked_again_whoever_dials() {
    let ((for_a, at_a), (for_b, at_b)) = (bind(), bind());
    let both = config(&[("a", at_a), ("b", at_b)]);
    let mut a = Node::start(identity("a"), for_a, both.clone());
    let mut b = Node::start(identity("b"), for_b, both.clone());
    a.up("b");
    b.up("a");
    drop(b);
    a.down("b");
    assert_eq!(a.stands("b", LinkWord::Down).state, LinkWord::Down);
    let mut b = Node::start(Identity { incarnation: 2, ..identity("b") }, TcpListener::bind(at_b).unwrap(), both.clone());
    assert_eq!(a.up("b"), 2);
    b.up("a");
    drop(a);
    b.down("a");
    let mut a = Node::start(Identity { incarnation: 2, ..identity("a") }, TcpListener::bind(at_a).unwrap(), both);
    assert_eq!(b.up("a"), 2);
    a.up("b");
}

#[test]
fn a_peer_that_the_core_refuses_is_told_why_and_may_come_back_when_it_is_another_start() {
    let (mut a, mut b, both) = pair();
    b.mesh.refuse(&id("a"), "its disk is not the one admitted");
    assert_eq!(b.down("a"), "its disk is not the one admitted");
    let reason = a.down("b");
    assert!(reason.ends_with(" refused this node: its disk is not the one admitted"), "{reason}");
    assert_eq!(a.refused().0, Some(id("b")));
    assert_eq!(b.refused(), (Some(id("a")), "its disk is not the one admitted".to_owned()));
    for (node, peer) in [(&a, "b"), (&b, "a")] {
        assert!(node.stands(peer, LinkWord::Refused).reason.unwrap().ends_with("its disk is not the one admitted"));
    }
    drop(a);
    let mut a = Node::start(Identity { incarnation: 2, ..identity("a") }, bind().0, both);
    a.up("b");
    assert_eq!(b.up("a"), 2);
}

#[test]
fn a_peer_cannot_fill_the_log_with_its_reasons() {
    let (mut b, at_b) = listener_b();
    let mut hand = Hand::dial(at_b);
    hand.write(&Packet::Refused { reason: "x".repeat(4_000) });
    assert!(b.refused().1.len() < 600);
    let mut hand = Hand::link(at_b, &identity("a"));
    hand.write(&Packet::Refused { reason: "ü".repeat(500_000) });
    assert!(b.down("a").chars().count() < 600);
    let mut hand = Hand::link(at_b, &identity("a"));
    let body = [&[0x92, PROTOCOL_VERSION, 0x81, 0xda, 0xff, 0xff][..], &[b'x'; 0xffff], &[0xc0]].concat();
    hand.0.write_all(&[&u32::try_from(body.len()).unwrap().to_be_bytes(), &body[..]].concat()).unwrap();
    let reason = b.down("a");
    assert!(reason.contains("unknown variant `xxx") && reason.len() < 600, "{reason}");
}

#[test]
fn peers_and_addresses_can_be_changed_while_it_runs() {
    let ((for_a, at_a), (for_b, at_b)) = (bind(), bind());
    let mut a = Node::start(identity("a"), for_a, config(&[("a", at_a)]));
    let mut b = Node::start(identity("b"), for_b, config(&[("a", at_a), ("b", at_b)]));
    assert!(a.mesh.links().is_empty(), "not linked to itself");
    assert_eq!(b.status("a").reason.as_deref(), Some("waiting for a to dial"));
    a.mesh.configure(config(&[("b", nowhere())]));
    let since = Instant::now();
    while !a.status("b").reason.unwrap().contains("cannot connect to 127.0.0.1:1: ") {
        assert!(since.elapsed() < WAIT, "{:?}", a.status("b"));
    }
    a.mesh.configure(config(&[("b", at_b)]));
    a.up("b");
    b.up("a");
    a.mesh.configure(config(&[]));
    assert_eq!(a.down("b"), "removed from peers.json");
    b.down("a");
    assert!(a.mesh.links().is_empty());
    a.send("b", &fetch(1)).unwrap();
    a.mesh.configure(config(&[("b", at_b)]));
    a.up("b");
    b.up("a");
}

/// Three nodes, or more, of which these pairs are cut. Nobody has been waited for.
fn nodes(names: &[&str], cuts: &[(&str, &str)]) -> (Vec<Node>, MeshConfig) {
    let bound: Vec<_> = names.iter().map(|_| bind()).collect();
    let addresses: Vec<_> = names.iter().zip(&bound).map(|(name, (_, address))| (*name, *address)).collect();
    let whole = config(&addresses);
    let started = names.iter().zip(bound).map(|(name, (listener, _))| {
        let cut_off = cuts.iter().filter_map(|(one, other)| if one == name { Some(*other) } else { (other == name).then_some(*one) });
        let config = MeshConfig { cut: cut_off.map(id).collect(), ..whole.clone() };
        Node::start(identity(name), listener, config)
    });
    (started.collect(), whole)
}

/// `a`, `b` and `c`; `a` and `c` are cut, and reach each other over `b`.
fn relayed() -> (Node, Node, Node, MeshConfig) {
    let (nodes, whole) = nodes(&["a", "b", "c"], &[("a", "c")]);
    let [mut a, b, mut c] = <[Node; 3]>::try_from(nodes).unwrap_or_else(|_| panic!("three"));
    assert_eq!(a.rerouted("c"), Some(id("b")));
    assert_eq!(c.rerouted("a"), Some(id("b")));
    (a, b, c, whole)
}

#[test]
fn two_nodes_that_are_cut_apart_reach_each_other_over_a_third_in_order_and_once() {
    let (mut a, b, mut c, _) = relayed();
    assert_eq!((a.linked[&id("c")], c.linked[&id("a")]), (1, 1));
    for number in 0..1_000 {
        a.send("c", &fetch(number)).unwrap();
        c.send("a", &fetch(number)).unwrap();
    }
    for number in 0..1_000 {
        assert_eq!(a.message(), fetch(number));
        assert_eq!(c.message(), fetch(number));
    }
    for message in messages() {
        a.send("c", &message).unwrap();
        assert_eq!(c.message(), message);
    }
    let around = frame::encode(&Packet::Message(&large(100_000))).unwrap().len() - 4 - 100_000;
    let largest = large(MESSAGE_BYTES_MAX - around);
    a.send("c", &largest).unwrap();
    assert!(c.message() == largest, "an envelope holds whatever a link does");
    let status = a.status("c");
    assert_eq!((status.state, status.reason.as_deref()), (LinkWord::Relayed, Some("over b: cut by partitions in peers.json")));
    b.has_passed_on((2_000 + messages().len() as u64 + 1, 0));
}

#[test]
fn a_healed_link_takes_the_place_of_the_one_over_a_third_node_and_the_other_way_round() {
    let (mut a, mut b, mut c, whole) = relayed();
    a.mesh.configure(whole.clone());
    c.mesh.configure(whole.clone());
    assert_eq!((a.rerouted("c"), c.rerouted("a")), (None, None));
    assert_eq!((a.linked.len(), c.linked.len()), (2, 2), "nothing went down");
    assert_eq!(a.stands("c", LinkWord::Up).reason, None);
    let (passed_on, _) = b.mesh.passed_on();
    a.send("c", &fetch(1)).unwrap();
    assert_eq!(c.message(), fetch(1));
    assert_eq!(b.mesh.passed_on().0, passed_on, "directly");
    a.mesh.configure(cut(&whole, "c"));
    assert_eq!(a.down("c"), "cut by partitions in peers.json", "what was under way is lost, and that is said");
    assert_eq!((a.up("c"), a.rerouted("c")), (1, Some(id("b"))));
    c.down("a");
    assert_eq!((c.up("a"), c.rerouted("a")), (1, Some(id("b"))));
    a.send("c", &fetch(2)).unwrap();
    assert_eq!(c.message(), fetch(2));
    // b is told of nothing that it has to do with.
    b.send("a", &fetch(3)).unwrap();
    assert_eq!(a.message(), fetch(3));
    b.up("c");
}

#[test]
fn when_the_third_node_is_lost_the_next_one_takes_its_place_or_the_link_is_down() {
    let (nodes, _) = nodes(&["a", "b", "c", "d"], &[("a", "d")]);
    let [mut a, b, c, mut d] = <[Node; 4]>::try_from(nodes).unwrap_or_else(|_| panic!("four"));
    // Whichever they met first: in the end it is the lowest.
    while a.rerouted("d") != Some(id("b")) {}
    while d.rerouted("a") != Some(id("b")) {}
    drop(b);
    let reason = a.down("d");
    assert!(reason.starts_with("no way over b any more: "), "{reason}");
    assert_eq!((a.up("d"), a.rerouted("d")), (1, Some(id("c"))));
    d.down("a");
    assert_eq!((d.up("a"), d.rerouted("a")), (1, Some(id("c"))));
    a.send("d", &fetch(1)).unwrap();
    assert_eq!(d.message(), fetch(1));
    drop(c);
    let reason = a.down("d");
    assert!(reason.starts_with("no way over c any more: "), "{reason}");
    assert_eq!(a.stands("d", LinkWord::Cut).reason.as_deref(), Some("cut by partitions in peers.json"));
    a.send("d", &fetch(2)).unwrap();
}

#[test]
fn a_node_that_restarts_behind_a_third_one_is_another_start_of_it() {
    let (mut a, _b, c, whole) = relayed();
    drop(c);
    a.down("c");
    let at_c = whole.peers.iter().find(|peer| peer.id == id("c")).unwrap().control.clone();
    let c = Identity { incarnation: 2, ..identity("c") };
    let mut c = Node::start(c, TcpListener::bind(&at_c).unwrap(), cut(&whole, "a"));
    assert_eq!((a.up("c"), c.up("a")), (2, 1));
    c.send("a", &fetch(1)).unwrap();
    let from = a.until("a message of the new start", |event| match event {
        MeshEvent::Message { from, incarnation, .. } => Some((from.clone(), *incarnation)),
        _ => None,
    });
    assert_eq!(from, (id("c"), 2));
}

#[test]
fn a_peer_that_is_refused_is_not_reached_over_a_third_node_either() {
    let (mut a, b, mut c, whole) = relayed();
    a.mesh.refuse(&id("c"), "its disk is not the one admitted");
    assert_eq!(a.down("c"), "no way over b any more: its disk is not the one admitted");
    a.stands("c", LinkWord::Cut);
    // What c says is not heard, though b passes it on: b's own message comes after it.
    c.send("a", &fetch(1)).unwrap();
    b.has_passed_on((1, 0));
    b.send("a", &fetch(2)).unwrap();
    assert_eq!(a.message(), fetch(2));
    // The same over a direct link, for both ends.
    a.mesh.configure(whole.clone());
    c.mesh.configure(whole);
    a.up("c");
    assert_eq!(c.rerouted("a"), None);
    c.mesh.refuse(&id("a"), "its disk is not the one admitted");
    assert_eq!(c.down("a"), "its disk is not the one admitted");
    assert!(a.down("c").ends_with("refused this node: its disk is not the one admitted"));
    a.stands("c", LinkWord::Refused);
    c.stands("a", LinkWord::Refused);
}

#[test]
fn whoever_is_taken_out_of_the_peers_is_not_reached_over_others() {
    let (mut a, _b, mut c, whole) = relayed();
    let without_c = MeshConfig { peers: whole.peers.iter().filter(|peer| peer.id != id("c")).cloned().collect(), ..whole.clone() };
    a.mesh.configure(without_c);
    assert_eq!(a.down("c"), "no way over b any more: removed from peers.json");
    assert!(!a.mesh.links().contains_key(&id("c")));
    a.mesh.configure(cut(&whole, "c"));
    a.up("c");
    a.send("c", &fetch(1)).unwrap();
    assert_eq!(c.message(), fetch(1));
}

/// Node `b`, and by hand `a` and `aa`, which are both linked to it.
fn two_hands() -> (Node, Hand, Hand) {
    let (listener, at_b) = bind();
    let mut b = Node::start(identity("b"), listener, config(&[("a", nowhere()), ("aa", nowhere()), ("b", at_b), ("c", nowhere())]));
    let a = Hand::link(at_b, &identity("a"));
    b.up("a");
    let other = Hand::link(at_b, &Identity { incarnation: 5, disk_id: DiskId([5; 8]), ..identity("aa") });
    b.up("aa");
    (b, a, other)
}

fn envelope(to: &str, incarnation: Incarnation, packet: &Packet<&Message>) -> Packet<&'static Message> {
    let body = frame::Body(frame::encode(packet).unwrap().split_off(4));
    Packet::Relay { to: id(to), incarnation, lost: 0, body }
}

fn start(incarnation: Incarnation, disk: u8) -> Start {
    Start { incarnation, disk_id: DiskId([disk; 8]) }
}

fn links(up: &[(&str, Start)], down: &[&str]) -> Packet<&'static Message> {
    let up = up.iter().map(|(name, start)| Neighbour { node: id(name), start: *start });
    Packet::Links { up: up.collect(), down: down.iter().map(|name| id(name)).collect() }
}

#[test]
fn a_neighbour_is_told_of_links_and_only_what_has_a_link_is_passed_on() {
    let (b, mut a, mut aa) = two_hands();
    let read = |hand: &mut Hand| hand.read().unwrap();
    assert_eq!(read(&mut a), Packet::Links { up: vec![Neighbour { node: id("aa"), start: start(5, 5) }], down: vec![] });
    assert_eq!(read(&mut aa), Packet::Links { up: vec![Neighbour { node: id("a"), start: start(1, 7) }], down: vec![] });
    let message = fetch(1);
    let inner = Packet::Message(&message);
    // To another start, to nobody, to one that is not linked, to the relay, and back: dropped, whatever is in it.
    for (to, incarnation) in [("aa", 4), ("x", 1), ("c", 1), ("b", 1), ("a", 1)] {
        a.write(&envelope(to, incarnation, &inner));
    }
    a.write(&envelope("aa", 5, &inner));
    let Packet::Relayed { from, start: of, body, .. } = read(&mut aa) else { panic!("no envelope") };
    assert_eq!((from, of, body.message().unwrap()), (id("a"), start(1, 7), fetch(1)));
    b.has_passed_on((1, 5));
    drop(aa);
    assert_eq!(read(&mut a), Packet::Links { up: vec![], down: vec![id("aa")] });
}

#[test]
fn envelopes_of_strangers_are_dropped_and_one_with_garbage_costs_its_sender_the_link_and_not_the_third_node() {
    let (mut b, mut a, mut aa) = two_hands();
    let message = fetch(1);
    let body = |packet: &Packet<&Message>| frame::Body(frame::encode(packet).unwrap().split_off(4));
    let relayed = |from: &str, start: Start, body: frame::Body| Packet::Relayed { from: id(from), start, lost: 0, body };
    let good = body(&Packet::Message(&message));
    // Nobody has said that a reaches c; and of b and a themselves nobody may speak.
    for from in ["c", "x", "b", "a"] {
        a.write(&relayed(from, start(1, 7), good.clone()));
    }
    a.write(&links(&[("c", start(3, 3)), ("x", start(1, 7)), ("b", start(1, 7)), ("a", start(1, 7))], &[]));
    assert_eq!((b.up("c"), b.rerouted("c")), (3, Some(id("a"))));
    for of in [start(2, 3), start(3, 4)] {
        a.write(&relayed("c", of, good.clone()));
    }
    aa.write(&relayed("c", start(3, 3), good.clone()));
    a.write(&relayed("c", start(3, 3), good.clone()));
    assert_eq!(b.next("a message"), MeshEvent::Message { from: id("c"), incarnation: 3, message: fetch(1) });
    let garbage =
        [frame::Body(vec![]), frame::Body(vec![0x92, 9]), body(&Packet::Welcome), body(&envelope("c", 3, &Packet::Message(&message)))];
    for (number, garbage) in (4..).zip(garbage) {
        a.write(&links(&[("c", start(number, 3))], &[]));
        assert_eq!(b.up("c"), number);
        b.rerouted("c");
        a.write(&relayed("c", start(number, 3), garbage));
        let reason = b.down("c");
        assert!(reason.starts_with("no way over a any more: over a: "), "{reason}");
        let (peer, said) = b.refused();
        assert!(peer == Some(id("c")) && said.starts_with("over a: "), "{said}");
        // The next one is not even looked at.
        a.write(&relayed("c", start(number, 3), frame::Body(vec![])));
    }
    a.write(&Packet::Message(&message));
    assert_eq!(b.next("a message"), MeshEvent::Message { from: id("a"), incarnation: 1, message: fetch(1) });
    assert_eq!(b.status("a").state, LinkWord::Up);
}

#[test]
fn an_end_that_has_lost_a_connection_says_so_and_the_other_answers_over_the_third_node_at_once() {
    let (mut b, mut a, mut aa) = two_hands();
    assert!(matches!((a.read(), aa.read()), (Some(Packet::Links { .. }), Some(Packet::Links { .. }))));
    let message = fetch(1);
    let body = frame::Body(frame::encode(&Packet::Message(&message)).unwrap().split_off(4));
    let relayed = |lost| Packet::Relayed { from: id("aa"), start: start(5, 5), lost, body: body.clone() };
    a.write(&links(&[("aa", start(5, 5))], &[]));
    // Some other connection, or none: what was under way when the present one was made.
    for lost in [0, aa.1 ^ 1] {
        a.write(&relayed(lost));
        assert_eq!(b.next("a message"), MeshEvent::Message { from: id("aa"), incarnation: 5, message: fetch(1) });
    }
    a.write(&relayed(aa.1));
    assert_eq!((b.down("aa"), b.up("aa"), b.rerouted("aa")), ("the other end has lost it".to_owned(), 5, Some(id("a"))));
    assert_eq!(b.next("a message"), MeshEvent::Message { from: id("aa"), incarnation: 5, message: fetch(1) });
    b.send("aa", &fetch(2)).unwrap();
    assert_eq!(a.read(), Some(Packet::Links { up: vec![], down: vec![id("aa")] }));
    let Some(Packet::Relay { to, incarnation: 5, lost, body }) = a.read() else { panic!("no envelope") };
    assert_eq!((to, lost, body.message().unwrap()), (id("aa"), aa.1, fetch(2)));
    assert_eq!(aa.read(), None, "the connection is closed");
    let Hand(_, last) = Hand::link(aa.0.peer_addr().unwrap(), &Identity { incarnation: 5, disk_id: DiskId([5; 8]), ..identity("aa") });
    assert_ne!(last, aa.1);
    assert_eq!(b.rerouted("aa"), None, "told once of the end, and now of the new one");
}

#[test]
fn what_is_passed_on_to_a_slow_node_is_dropped_before_it_costs_its_link() {
    let (b, mut a, aa) = two_hands();
    assert!(matches!(a.read(), Some(Packet::Links { .. })));
    let message = large(500_000);
    let envelope = frame::encode(&envelope("aa", 5, &Packet::Message(&message))).unwrap();
    let since = Instant::now();
    while b.mesh.passed_on().1 == 0 {
        assert!(since.elapsed() < WAIT, "waited in vain for one that is dropped");
        a.0.write_all(&envelope).unwrap();
    }
    let status = b.status("aa");
    assert_eq!(status.state, LinkWord::Up);
    assert!(status.queue_bytes > 0 && status.queue_bytes <= QUEUE_BYTES_MAX / 2, "{status:?}");
    drop(aa);
}

#[test]
fn links_that_come_and_go_keep_their_events_in_order_over_a_third_node_too() {
    let (mut a, mut b, mut c, whole) = relayed();
    let mut random = fastrand::Rng::with_seed(5);
    for number in 0..150 {
        let (one, peer) = [(&a, "c"), (&c, "a"), (&b, "c"), (&a, "b")][random.usize(..4)];
        one.mesh.configure(cut(&whole, peer));
        a.send("c", &fetch(number)).unwrap();
        c.send("a", &fetch(number)).unwrap();
        if random.bool() {
            one.mesh.configure(whole.clone());
        }
        for node in [&mut a, &mut b, &mut c] {
            while !node.events.is_empty() {
                node.next("whatever happened");
            }
        }
    }
    for node in [&a, &b, &c] {
        node.mesh.configure(whole.clone());
    }
    for (node, peers) in [(&mut a, ["b", "c"]), (&mut b, ["a", "c"]), (&mut c, ["a", "b"])] {
        for peer in peers {
            node.stands(peer, LinkWord::Up);
        }
        while !node.events.is_empty() || node.linked.len() < 2 {
            node.next("the links");
        }
    }
}
