//! What answers for a loaded model.

use std::sync::Arc;
use std::time::Duration;

use crate::gateway::onnx::Onnx;
use crate::gateway::upstream::Upstream;

/// How long a model server's warm-up counts, in milliseconds: it may go away any time.
pub const UPSTREAM_WARM_MS_MAX: u64 = 10_000;

/// A loaded model.
#[derive(Debug)]
pub(crate) enum Backend {
    /// Computed in this process.
    Onnx(Onnx),
    /// Asked of a model server.
    Http(Arc<Upstream>),
}

impl Backend {
    /// Tries the model out. The error says what went wrong.
    pub(crate) async fn warm_up(&self) -> Result<(), String> {
        match self {
            Backend::Onnx(onnx) => onnx.warm_up().await,
            Backend::Http(upstream) => upstream.warm_up().await,
        }
    }

    /// Whether a warm-up this long ago still counts.
    pub(crate) fn is_warm_after(&self, age: Duration) -> bool {
        match self {
            Backend::Onnx(_) => true,
            Backend::Http(_) => age < Duration::from_millis(UPSTREAM_WARM_MS_MAX),
        }
    }
}
