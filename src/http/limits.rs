//! Every limit of the front, with its unit in its name.

/// Longest head of a request (request line and headers), in bytes: 431.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Most header lines of a request: 431.
pub const HEADERS_MAX: usize = 100;
/// Longest body of a prediction that is waited for as a whole, in bytes: 413. Models in the process need all of it.
pub const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Longest body of a prediction that is passed on to a model server as it comes, in bytes: 413.
pub const FORWARDED_BODY_BYTES_MAX: u64 = 64 << 30;
/// Longest body of a request to any other resource, in bytes: 413.
pub const RESOURCE_BODY_BYTES_MAX: u64 = 1024 * 1024;
/// From a head's first byte to its last, in milliseconds: 408.
pub const HEAD_MS_MAX: u64 = 10_000;
/// From a body's first wait to its last byte, in milliseconds: 408.
pub const BODY_MS_MAX: u64 = 300_000;
/// Beyond that time a body may take as long as it keeps up this rate from its beginning on, in bytes a second.
pub const BODY_BYTES_PER_S_MIN: u64 = 16 * 1024;
/// How long a connection that has changed its protocol may be silent in both directions, in milliseconds.
pub const TUNNEL_IDLE_MS_MAX: u64 = 600_000;
/// Longest pause within a body, or while the caller takes no more of its answer, in milliseconds.
pub const STALL_MS_MAX: u64 = 30_000;
/// How long a connection may wait for its next request, in milliseconds; then it is closed.
pub const IDLE_MS_MAX: u64 = 75_000;
/// How long a connection that is closed on unread input goes on reading, in milliseconds, so that its caller sees the answer.
pub const LINGER_MS_MAX: u64 = 2_000;
/// Connections at once. One more is answered 503 and closed: its caller can go elsewhere at once instead of waiting unheard.
/// Fewer if the process may not open enough files for so many (`ulimit -n`): the log and the mesh need theirs.
pub const CONNECTIONS_MAX: usize = 4_096;
/// Open files that are left to everything but requests.
const OTHER_FILES: usize = 128;
/// Connections at once that are being told 503. Beyond them a connection is closed without a word.
pub const TURNED_AWAY_MAX: usize = 64;
/// How long a stopping front waits for the requests in flight, in milliseconds.
pub const DRAIN_MS_MAX: u64 = 10_000;
/// How long a stopping front waits, in milliseconds, for the caller of an answer without an end to take the rest of it.
pub const STREAM_DRAIN_MS_MAX: u64 = 1_000;
/// Streams of events at once: 503.
pub const EVENT_STREAMS_MAX: usize = 64;
/// Events that are kept for whoever comes back.
pub const EVENTS_KEPT_MAX: usize = 1_024;
/// Size of what is kept of them, in bytes.
pub const EVENTS_KEPT_BYTES_MAX: usize = 1024 * 1024;
/// Names of events that one stream can be of: 400.
pub const EVENT_NAMES_MAX: usize = 32;
/// From one ping of a stream to the next, in milliseconds. Shorter than what proxies take for silence, often 30 s.
pub const PING_MS: u64 = 10_000;
/// First pause after a failed accept, in milliseconds; it doubles up to [`ACCEPT_PAUSE_MS_MAX`].
pub const ACCEPT_PAUSE_MS_MIN: u64 = 10;
/// Longest pause after a failed accept, in milliseconds.
pub const ACCEPT_PAUSE_MS_MAX: u64 = 1_000;

/// The limits that a front is run with.
#[derive(Clone, Debug)]
pub struct Limits {
    /// See [`HEAD_BYTES_MAX`].
    pub head_bytes_max: usize,
    /// See [`HEADERS_MAX`].
    pub headers_max: usize,
    /// See [`BODY_BYTES_MAX`].
    pub body_bytes_max: u64,
    /// See [`RESOURCE_BODY_BYTES_MAX`].
    pub resource_body_bytes_max: u64,
    /// See [`HEAD_MS_MAX`].
    pub head_ms_max: u64,
    /// See [`BODY_MS_MAX`].
    pub body_ms_max: u64,
    /// See [`STALL_MS_MAX`].
    pub stall_ms_max: u64,
    /// See [`IDLE_MS_MAX`].
    pub idle_ms_max: u64,
    /// See [`LINGER_MS_MAX`].
    pub linger_ms_max: u64,
    /// See [`CONNECTIONS_MAX`].
    pub connections_max: usize,
    /// See [`DRAIN_MS_MAX`].
    pub drain_ms_max: u64,
    /// See [`STREAM_DRAIN_MS_MAX`].
    pub stream_drain_ms_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            head_bytes_max: HEAD_BYTES_MAX,
            headers_max: HEADERS_MAX,
            body_bytes_max: BODY_BYTES_MAX,
            resource_body_bytes_max: RESOURCE_BODY_BYTES_MAX,
            head_ms_max: HEAD_MS_MAX,
            body_ms_max: BODY_MS_MAX,
            stall_ms_max: STALL_MS_MAX,
            idle_ms_max: IDLE_MS_MAX,
            linger_ms_max: LINGER_MS_MAX,
            connections_max: CONNECTIONS_MAX,
            drain_ms_max: DRAIN_MS_MAX,
            stream_drain_ms_max: STREAM_DRAIN_MS_MAX,
        }
    }
}

/// Connections that the process can hold, each with one to a model server behind it. Unlimited where that cannot be found out.
pub(super) fn connections_possible() -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    open_files(&limits).map_or(usize::MAX, |files| (files.saturating_sub(OTHER_FILES) / 2).max(1))
}

/// The soft limit of open files, from the text of `/proc/self/limits`.
fn open_files(limits: &str) -> Option<usize> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_open_files_is_read() {
        let text = "Limit                     Soft Limit           Hard Limit           Units\n\
                    Max processes             63432                63432                processes\n\
                    Max open files            1024                 524288               files\n";
        assert_eq!(open_files(text), Some(1_024));
        assert_eq!(open_files("Max open files unlimited unlimited files"), None);
        assert_eq!(open_files(""), None);
        assert!(connections_possible() >= 1);
    }
}
