//! Every limit of the front, with its unit in its name.

/// Longest head of a request (request line and headers), in bytes: 431.
pub const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Most header lines of a request: 431.
pub const HEADERS_MAX: usize = 100;
/// Longest body of a prediction, in bytes: 413.
pub const BODY_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Longest body of a request to any other resource, in bytes: 413.
pub const RESOURCE_BODY_BYTES_MAX: u64 = 1024 * 1024;
/// From a head's first byte to its last, in milliseconds: 408.
pub const HEAD_MS_MAX: u64 = 10_000;
/// From a body's first wait to its last byte, in milliseconds: 408.
pub const BODY_MS_MAX: u64 = 300_000;
/// Longest pause within a body, or while the caller takes no more of its answer, in milliseconds.
pub const STALL_MS_MAX: u64 = 30_000;
/// How long a connection may wait for its next request, in milliseconds; then it is closed.
pub const IDLE_MS_MAX: u64 = 75_000;
/// How long a connection that is closed on unread input goes on reading, in milliseconds, so that its caller sees the answer.
pub const LINGER_MS_MAX: u64 = 2_000;
/// Connections at once. One more is answered 503 and closed: its caller can go elsewhere at once instead of waiting unheard.
pub const CONNECTIONS_MAX: usize = 4_096;
/// Connections at once that are being told 503. Beyond them a connection is closed without a word.
pub const TURNED_AWAY_MAX: usize = 64;
/// How long a stopping front waits for the requests in flight, in milliseconds.
pub const DRAIN_MS_MAX: u64 = 10_000;
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
        }
    }
}
