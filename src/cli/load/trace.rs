//! `load --trace`: a line for every answer, in the order in which they came, for whoever wants to know what happened when.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::api::{MODEL_HEADER, NODE_HEADER, REASON_HEADER, VARIANT_HEADER, VERSION_HEADER};
use crate::cli::client::{Answer, CallError};
use crate::cli::endpoint::Target;
use crate::clock::unix_ms;

/// The names of the columns. Times are Unix milliseconds with three decimals, and what an answer did not say is empty.
const HEADER: &str = "due_ms,sent_ms,answered_ms,node,status,variant,model,version,reason";

/// A request's three moments.
#[derive(Clone, Copy, Debug)]
pub struct Moments {
    /// Its turn.
    pub due: Instant,
    /// A connection was free, and it was written.
    pub sent: Instant,
    /// Its answer was there, or known not to come.
    pub answered: Instant,
}

/// The file.
#[derive(Debug)]
pub struct Trace {
    path: PathBuf,
    /// The same moment by both clocks: what is written does not jump when the wall clock does.
    began: (Instant, u64),
    /// The first failure ends the writing.
    file: Mutex<Result<BufWriter<File>, io::Error>>,
}

impl Trace {
    /// Writes to a new file, or over an old one. The error is a sentence.
    pub fn create(path: &Path) -> Result<Trace, String> {
        let begin = || -> io::Result<BufWriter<File>> {
            let mut file = BufWriter::new(File::create(path)?);
            writeln!(file, "{HEADER}")?;
            Ok(file)
        };
        let file = begin().map_err(|error| format!("{}: {error}", path.display()))?;
        Ok(Trace { path: path.to_owned(), began: (Instant::now(), unix_ms()), file: Mutex::new(Ok(file)) })
    }

    /// Adds a line.
    pub fn note(&self, target: &Target, answer: &Result<Answer, CallError>, moments: Moments) {
        let answer = answer.as_ref().ok();
        let said = |name| answer.and_then(|answer| answer.headers.get(name)?.to_str().ok()).map(field);
        let node = said(NODE_HEADER).unwrap_or_else(|| field(&target.endpoint.to_string()));
        let status = answer.map(|answer| answer.status.as_u16().to_string()).unwrap_or_default();
        let [variant, model, version, reason] =
            [VARIANT_HEADER, MODEL_HEADER, VERSION_HEADER, REASON_HEADER].map(|name| said(name).unwrap_or_default());
        let [due, sent, answered] = [moments.due, moments.sent, moments.answered].map(|moment| self.ms(moment));
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Ok(to) = file.as_mut()
            && let Err(error) = writeln!(to, "{due:.3},{sent:.3},{answered:.3},{node},{status},{variant},{model},{version},{reason}")
        {
            *file = Err(error);
        }
    }

    /// All lines are in the file, or this is why not.
    pub fn finish(&self) -> Result<(), String> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        let written = match file.as_mut() {
            Ok(file) => file.flush(),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        written.map_err(|error| format!("{} is not whole: {error}", self.path.display()))
    }

    fn ms(&self, moment: Instant) -> f64 {
        let (instant, unix_ms) = self.began;
        unix_ms as f64 + moment.saturating_duration_since(instant).as_secs_f64() * 1e3
    }
}

/// A value between commas, however strange.
fn field(value: &str) -> String {
    if value.contains([',', '"']) { format!("\"{}\"", value.replace('"', "\"\"")) } else { value.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strange_value_stays_one_field() {
        assert_eq!([field("node-a"), field("a,b"), field("say \"a\"")], ["node-a", "\"a,b\"", "\"say \"\"a\"\"\""]);
    }

    #[test]
    fn a_full_disk_is_told() {
        let full = Path::new("/dev/full");
        if full.exists() {
            let trace = Trace::create(full).unwrap();
            assert!(trace.finish().unwrap_err().starts_with("/dev/full is not whole: "));
        }
    }
}
