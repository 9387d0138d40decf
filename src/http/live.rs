//! Live events: the newest are kept in a ring, and every stream of `GET /events` reads it at its own pace.
//!
//! Whoever tells of something pushes it and goes on. A push takes a lock that is held for a copy and never for I/O, so no reader can
//! hold up the one who tells. A stream owns a position in the ring and at most one frame: one that is too slow finds that the ring has
//! gone on without it, is told how much it has missed, and goes on with the oldest that is kept.
//!
//! Frames are those of <https://html.spec.whatwg.org/multipage/server-sent-events.html>.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use async_io::Timer;
use bytes::{Buf, Bytes};
use futures::{AsyncBufRead, AsyncRead};
use serde_json::json;

use super::{EVENT_STREAMS_MAX, EVENTS_KEPT_BYTES_MAX, EVENTS_KEPT_MAX, PING_MS, Refusal};

/// The events that are kept, and who reads them.
#[derive(Debug)]
pub struct LiveEvents {
    /// Of this process, and of no other on any node. An incarnation would be used twice by a node that has lost its log, and a caller
    /// whose proxy sends it to another node must not be taken for one who has seen that node's events.
    start: u64,
    ring: Mutex<Ring>,
}

#[derive(Debug, Default)]
struct Ring {
    kept: VecDeque<Kept>,
    kept_bytes: usize,
    /// The newest event's number; the first one's is 1.
    newest: u64,
    ended: bool,
    /// The open streams, each with whom to wake if it has read everything.
    streams: BTreeMap<u64, Option<Waker>>,
    streams_opened: u64,
}

#[derive(Debug)]
struct Kept {
    name: String,
    frame: Bytes,
}

impl Ring {
    /// The number of the newest event that is not kept any more; 0 if all are.
    fn gone(&self) -> u64 {
        self.newest.saturating_sub(self.kept.len() as u64)
    }

    /// The first event behind this one, if it is kept.
    fn behind(&self, number: u64) -> Option<&Kept> {
        self.kept.get(usize::try_from(number.checked_sub(self.gone())?).ok()?)
    }

    fn is_full(&self) -> bool {
        self.kept.len() > EVENTS_KEPT_MAX || self.kept_bytes > EVENTS_KEPT_BYTES_MAX
    }

    fn take_wakers(&mut self) -> Vec<Waker> {
        self.streams.values_mut().filter_map(Option::take).collect()
    }
}

/// Names an event: `<start>-<number>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct EventId {
    start: u64,
    number: u64,
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}-{}", self.start, self.number)
    }
}

impl FromStr for EventId {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (start, number) = text.split_once('-').ok_or(())?;
        let id = EventId { start: u64::from_str_radix(start, 16).map_err(drop)?, number: number.parse().map_err(drop)? };
        // Numbers can be written in several ways; only what was handed out is an id.
        if id.to_string() == text { Ok(id) } else { Err(()) }
    }
}

impl LiveEvents {
    /// None yet. `start` has to differ from that of every other process: it tells this one's events from theirs.
    pub fn new(start: u64) -> Arc<LiveEvents> {
        Arc::new(LiveEvents { start, ring: Mutex::default() })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(&self, number: u64) -> EventId {
        EventId { start: self.start, number }
    }

    /// Tells every stream of an event. `data` is its JSON.
    pub fn push(&self, name: &str, data: &str) {
        let wakers = {
            let mut ring = self.ring();
            ring.newest += 1;
            let frame = frame(self.id(ring.newest), name, data);
            ring.kept_bytes += frame.len();
            ring.kept.push_back(Kept { name: name.to_owned(), frame });
            while ring.is_full() {
                let oldest = ring.kept.pop_front();
                ring.kept_bytes = ring.kept_bytes.saturating_sub(oldest.map_or(0, |kept| kept.frame.len()));
            }
            ring.take_wakers()
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Ends every stream behind what was pushed until now; no other is opened.
    pub fn end(&self) {
        let wakers = {
            let mut ring = self.ring();
            ring.ended = true;
            ring.take_wakers()
        };
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Streams that are open.
    pub fn streams(&self) -> usize {
        self.ring().streams.len()
    }

    /// A stream that begins behind the event with the id `last`; without it, behind the newest. Only events of these `names`, unless
    /// there are none. Refused when too many are open, or when the node stops.
    pub(super) fn open(self: &Arc<Self>, last: Option<&str>, names: Vec<String>) -> Result<EventStream, Refusal> {
        let mut ring = self.ring();
        if ring.ended {
            return Err(Refusal::new(503, "stopping", "the node is stopping, and its events end; ask another node"));
        }
        if ring.streams.len() >= EVENT_STREAMS_MAX {
            let sentence = format!("this node has {EVENT_STREAMS_MAX} event streams open, its limit; close one, or ask another node");
            return Err(Refusal::new(503, "too_many_streams", sentence));
        }
        let known = last.map(|last| last.parse().ok().filter(|id: &EventId| id.start == self.start && id.number <= ring.newest));
        let (behind, stranger) = match known {
            None => (ring.newest, false),
            Some(Some(id)) => (id.number, false),
            Some(None) => (ring.gone(), true),
        };
        ring.streams_opened += 1;
        let key = ring.streams_opened;
        ring.streams.insert(key, None);
        drop(ring);
        Ok(EventStream { live: self.clone(), key, behind, stranger, names, ping_ms: PING_MS, ping: None, frame: Bytes::new() })
    }
}

/// One event as it is sent. Whatever `name` and `data` are, it is one event: a line break in the data begins another line of it.
fn frame(id: EventId, name: &str, data: &str) -> Bytes {
    let mut text = format!("id: {id}\nevent: ");
    text.extend(name.chars().filter(|c| !c.is_control()));
    for line in data.split(['\n', '\r']) {
        text.push_str("\ndata: ");
        text.push_str(line);
    }
    text.push_str("\n\n");
    text.into()
}

/// One caller's stream: what it reads is what is sent. It counts as open until it is dropped.
#[derive(Debug)]
pub(super) struct EventStream {
    live: Arc<LiveEvents>,
    key: u64,
    /// The number of the last event that was passed.
    behind: u64,
    /// The caller named an event that this process does not know, and was not told so yet.
    stranger: bool,
    names: Vec<String>,
    ping_ms: u64,
    /// When the next ping is due; none was sent yet without it.
    ping: Option<Timer>,
    /// What is left of the frame that is being read.
    frame: Bytes,
}

impl EventStream {
    /// The next thing to send; `None` is the end.
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        let live = self.live.clone();
        if std::mem::take(&mut self.stranger) {
            let reason = "the last event that was named is none of this start of this node; the oldest that are kept follow, and GET /history \
                          has every decision";
            return Poll::Ready(Some(self.missed(None, reason)));
        }
        if self.poll_ping(cx).is_ready() {
            // A comment, which is no event. The id names the place without being one either: whoever has seen no event yet can come
            // back to it, and so can one who asked for few of them.
            return Poll::Ready(Some(format!(": ping\nid: {}\n\n", live.id(self.behind)).into()));
        }
        let mut ring = live.ring();
        let gone = ring.gone();
        if self.behind < gone {
            drop(ring);
            let missed = gone - self.behind;
            self.behind = gone;
            let reason = "so many events are not kept any more; the oldest that are kept follow, and GET /history has every decision";
            return Poll::Ready(Some(self.missed(Some(missed), reason)));
        }
        while let Some(kept) = ring.behind(self.behind) {
            self.behind += 1;
            if self.names.is_empty() || self.names.contains(&kept.name) {
                return Poll::Ready(Some(kept.frame.clone()));
            }
        }
        if ring.ended {
            return Poll::Ready(None);
        }
        ring.streams.insert(self.key, Some(cx.waker().clone()));
        Poll::Pending
    }

    /// Ready at once, and then every [`PING_MS`].
    fn poll_ping(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(due) = &mut self.ping {
            ready!(Pin::new(due).poll(cx));
        }
        self.ping = Some(Timer::after(Duration::from_millis(self.ping_ms)));
        Poll::Ready(())
    }

    /// The event that says that others are not there; `missed` is how many, where that is known.
    fn missed(&self, missed: Option<u64>, reason: &str) -> Bytes {
        let data = json!({"event": "missed", "missed": missed, "reason": reason});
        frame(self.live.id(self.behind), "missed", &data.to_string())
    }
}

impl Drop for EventStream {
    fn drop(&mut self) {
        self.live.ring().streams.remove(&self.key);
    }
}

impl AsyncBufRead for EventStream {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        if this.frame.is_empty() {
            this.frame = ready!(this.poll_frame(cx)).unwrap_or_default();
        }
        Poll::Ready(Ok(&this.frame))
    }

    fn consume(self: Pin<&mut Self>, bytes: usize) {
        let frame = &mut self.get_mut().frame;
        frame.advance(bytes.min(frame.len()));
    }
}

impl AsyncRead for EventStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut there = ready!(self.as_mut().poll_fill_buf(cx))?;
        let bytes = io::Read::read(&mut there, into)?;
        self.consume(bytes);
        Poll::Ready(Ok(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::executor::block_on;
    use futures::task::noop_waker;
    use std::future::poll_fn;

    const START: &str = "00000000000000ab";

    fn live() -> Arc<LiveEvents> {
        LiveEvents::new(0xab)
    }

    fn pushed(numbers: std::ops::RangeInclusive<u64>) -> Arc<LiveEvents> {
        let live = live();
        numbers.for_each(|number| push(&live, number));
        live
    }

    /// An even number is a `beat`, an odd one a `tick`.
    fn push(live: &LiveEvents, number: u64) {
        live.push(if number.is_multiple_of(2) { "beat" } else { "tick" }, &format!("{{\"n\":{number}}}"));
    }

    fn open(live: &Arc<LiveEvents>, last: Option<&str>) -> EventStream {
        live.open(last, Vec::new()).unwrap()
    }

    /// Everything that a stream has to say now.
    fn said(stream: &mut EventStream) -> Vec<String> {
        let waker = noop_waker();
        let mut cx = Context::from_waker(&waker);
        let frames = std::iter::from_fn(|| match stream.poll_frame(&mut cx) {
            Poll::Ready(frame) => frame,
            Poll::Pending => None,
        });
        frames.map(|frame| String::from_utf8(frame.to_vec()).unwrap()).collect()
    }

    /// The same without pings, each frame as its event's number, or the whole of it if it is no plain event.
    fn numbers(stream: &mut EventStream) -> Vec<String> {
        let frames = said(stream).into_iter().filter(|frame| !frame.starts_with(": ping"));
        frames.map(|frame| frame.split_once("{\"n\":").map_or(frame.clone(), |(_, n)| n.replace("}\n\n", ""))).collect()
    }

    fn ping(number: u64) -> String {
        format!(": ping\nid: {START}-{number}\n\n")
    }

    /// What a `missed` says it has missed, and the id it has.
    fn missed(frame: &str) -> (String, String) {
        let rest = frame.strip_prefix("id: ").unwrap();
        let (id, rest) = rest.split_once("\nevent: missed\ndata: ").unwrap();
        let data: serde_json::Value = serde_json::from_str(rest.strip_suffix("\n\n").unwrap()).unwrap();
        assert_eq!(data["event"], "missed");
        assert!(data["reason"].as_str().unwrap().contains("/history"));
        (data["missed"].to_string(), id.to_owned())
    }

    #[test]
    fn an_event_is_one_frame_with_an_id_a_name_and_its_data() {
        let live = live();
        let mut stream = open(&live, None);
        live.push("decided", r#"{"event":"decided","slot":3}"#);
        let event = format!("id: {START}-1\nevent: decided\ndata: {{\"event\":\"decided\",\"slot\":3}}\n\n");
        assert_eq!(said(&mut stream), [ping(0), event]);
    }

    #[test]
    fn neither_a_name_nor_data_can_begin_a_line_or_an_event_of_their_own() {
        let id = EventId { start: 0xab, number: 1 };
        let frame = frame(id, "a\nid: 9\r", "{\n\"b\":1}\r\nevent: forged\n\ndata: x");
        let frame = String::from_utf8(frame.to_vec()).unwrap();
        assert_eq!(frame.matches("\n\n").count(), 1, "{frame:?}");
        let lines: Vec<_> = frame.trim_end().split(['\n', '\r']).collect();
        assert_eq!(lines[..2], [format!("id: {START}-1"), "event: aid: 9".into()]);
        assert!(lines[2..].iter().all(|line| line.starts_with("data: ")), "{lines:?}");
    }

    #[test]
    fn a_stream_begins_with_what_is_new_from_now_on() {
        let live = pushed(1..=3);
        let mut stream = open(&live, None);
        assert_eq!(said(&mut stream), [ping(3)], "also without an event it says where it is");
        push(&live, 4);
        push(&live, 5);
        assert_eq!(numbers(&mut stream), ["4", "5"]);
        assert_eq!(numbers(&mut stream), [""; 0]);
    }

    #[test]
    fn a_stream_goes_on_behind_the_last_event_that_was_seen() {
        let live = pushed(1..=5);
        for (last, expected) in [(0, vec!["1", "2", "3", "4", "5"]), (3, vec!["4", "5"]), (5, vec![])] {
            assert_eq!(numbers(&mut open(&live, Some(&format!("{START}-{last}")))), expected, "behind {last}");
        }
    }

    #[test]
    fn who_comes_back_too_late_is_told_how_many_events_are_gone() {
        let last = EVENTS_KEPT_MAX as u64 + 10;
        let live = pushed(1..=last);
        let frames = numbers(&mut open(&live, Some(&format!("{START}-4"))));
        assert_eq!(missed(&frames[0]), ("6".into(), format!("{START}-10")));
        assert_eq!(frames[1..], (11..=last).map(|n| n.to_string()).collect::<Vec<_>>());
        let frames = numbers(&mut open(&live, Some(&format!("{START}-10"))));
        assert_eq!(frames.len(), EVENTS_KEPT_MAX, "nothing is missed behind the newest that is gone");
    }

    #[test]
    fn an_id_that_was_not_given_out_here_begins_with_missed_and_the_oldest_kept() {
        let live = pushed(1..=2);
        let others = ["00000000000000ac-1", "00000000000000ab-3", "ab-1", "00000000000000ab-01", "00000000000000ab-+1", "7", "-", "x-y"];
        for other in others {
            let mut stream = open(&live, Some(other));
            let first = said(&mut stream);
            assert_eq!(missed(&first[0]), ("null".into(), format!("{START}-0")), "{other}");
            assert_eq!(first[1], ping(0), "only now may the caller come back to here");
            assert_eq!(first.len(), 4);
            push(&live, 3);
            assert_eq!(numbers(&mut stream), ["3"], "it is said once");
            live.ring().newest = 2;
            live.ring().kept.pop_back();
        }
    }

    #[test]
    fn a_stream_that_is_too_slow_for_the_ring_is_told_and_goes_on_with_the_oldest_kept() {
        let live = pushed(1..=1);
        let mut stream = open(&live, None);
        assert_eq!(numbers(&mut stream), [""; 0]);
        let last = EVENTS_KEPT_MAX as u64 + 8;
        (2..=last).for_each(|number| push(&live, number));
        let frames = numbers(&mut stream);
        assert_eq!(missed(&frames[0]), ("7".into(), format!("{START}-8")));
        assert_eq!((frames[1].as_str(), frames.len()), ("9", EVENTS_KEPT_MAX + 1));
    }

    #[test]
    fn the_ring_is_bounded_in_bytes_also_by_an_event_that_is_larger_than_all_of_it() {
        let live = live();
        let kept = || {
            let ring = live.ring();
            (ring.kept.len(), ring.gone(), ring.kept_bytes <= EVENTS_KEPT_BYTES_MAX)
        };
        let mut stream = open(&live, None);
        let data = "x".repeat(EVENTS_KEPT_BYTES_MAX / 4);
        (0..5).for_each(|_| live.push("large", &data));
        assert_eq!(kept(), (3, 2, true));
        live.push("huge", &"x".repeat(EVENTS_KEPT_BYTES_MAX));
        assert_eq!(kept(), (0, 6, true));
        assert_eq!(missed(&numbers(&mut stream)[0]).0, "6");
        push(&live, 7);
        assert_eq!(numbers(&mut stream), ["7"]);
    }

    #[test]
    fn a_stream_of_some_names_leaves_the_others_out_and_still_says_where_it_is() {
        let live = pushed(1..=5);
        let mut stream = live.open(Some(&format!("{START}-1")), vec!["beat".into(), "other".into()]).unwrap();
        assert_eq!(numbers(&mut stream), ["2", "4"]);
        stream.ping = None;
        assert_eq!(said(&mut stream), [ping(5)]);
    }

    #[test]
    fn streams_are_limited_and_one_that_is_dropped_makes_room() {
        let live = live();
        let mut streams: Vec<_> = (0..EVENT_STREAMS_MAX).map(|_| open(&live, None)).collect();
        assert_eq!(live.streams(), EVENT_STREAMS_MAX);
        let refused = live.open(None, Vec::new()).unwrap_err();
        assert_eq!((refused.status, refused.error_code), (503, "too_many_streams"));
        streams.pop();
        assert_eq!(live.streams(), EVENT_STREAMS_MAX - 1);
        streams.push(open(&live, None));
        drop(streams);
        assert_eq!(live.streams(), 0);
    }

    #[test]
    fn a_stream_ends_behind_what_was_said_before_the_end_and_none_begins_after_it() {
        let live = live();
        let mut stream = open(&live, None);
        push(&live, 1);
        live.end();
        let rest = block_on(async {
            let mut rest = String::new();
            futures::AsyncReadExt::read_to_string(&mut stream, &mut rest).await.unwrap();
            rest
        });
        assert_eq!(rest, ping(0) + &format!("id: {START}-1\nevent: tick\ndata: {{\"n\":1}}\n\n"));
        let refused = live.open(None, Vec::new()).unwrap_err();
        assert_eq!((refused.status, refused.error_code), (503, "stopping"));
    }

    #[test]
    fn a_stream_that_waits_is_woken_by_an_event_and_by_the_end() {
        let live = live();
        let mut stream = open(&live, None);
        assert_eq!(said(&mut stream), [ping(0)]);
        let reading = std::thread::spawn(move || {
            let mut frames = Vec::new();
            while let Some(frame) = block_on(poll_fn(|cx| stream.poll_frame(cx))) {
                frames.push(frame);
            }
            frames.len()
        });
        for number in 1..=20 {
            push(&live, number);
            std::thread::yield_now();
        }
        live.end();
        assert_eq!(reading.join().unwrap(), 20);
    }

    #[test]
    fn a_stream_without_events_pings_again_and_again() {
        let live = live();
        let mut stream = open(&live, None);
        stream.ping_ms = 1;
        for _ in 0..5 {
            let frame = block_on(poll_fn(|cx| stream.poll_frame(cx))).unwrap();
            assert_eq!(frame, ping(0));
        }
    }
}
