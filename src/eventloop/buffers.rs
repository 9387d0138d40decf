//! Buffers that a thread's connections read into: most of them wait, and need none.

use std::cell::RefCell;

/// What is read at once while heads and short bodies come, in bytes.
pub(crate) const BUFFER_BYTES: usize = 16 * 1024;
/// The same within a long body.
pub(crate) const LONG_BODY_BUFFER_BYTES: usize = 128 * 1024;
/// Empty buffers that a thread keeps.
const SPARE_BUFFERS_MAX: usize = 128;
/// The same, of those for long bodies.
const SPARE_LONG_BUFFERS_MAX: usize = 16;

thread_local! {
    static SPARE: RefCell<Spare> = const { RefCell::new(Spare { short: Vec::new(), long: Vec::new() }) };
}

/// Buffers that nobody uses.
struct Spare {
    short: Vec<Vec<u8>>,
    long: Vec<Vec<u8>>,
}

/// A buffer of either size.
pub(crate) fn take(long: bool) -> Vec<u8> {
    let spare = SPARE.with_borrow_mut(|spare| if long { spare.long.pop() } else { spare.short.pop() });
    spare.unwrap_or_else(|| vec![0; if long { LONG_BODY_BUFFER_BYTES } else { BUFFER_BYTES }])
}

/// Gives a buffer back. One of another size, and one too many, is let go.
pub(crate) fn give_back(buffer: Vec<u8>) {
    SPARE.with_borrow_mut(|spare| match buffer.len() {
        BUFFER_BYTES if spare.short.len() < SPARE_BUFFERS_MAX => spare.short.push(buffer),
        LONG_BODY_BUFFER_BYTES if spare.long.len() < SPARE_LONG_BUFFERS_MAX => spare.long.push(buffer),
        _ => {}
    });
}
