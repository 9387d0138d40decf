//! The file of requests.

use std::path::Path;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

/// One request, and what its answer should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The right class of each row; empty where it is not known.
    pub labels: Vec<i64>,
    /// What is sent.
    pub body: Bytes,
}

/// The requests of a file, in their order. Not empty.
#[derive(Debug)]
pub struct Requests(Vec<Request>);

#[derive(Deserialize)]
struct Line<'a> {
    label: Option<Label>,
    #[serde(borrow)]
    request: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a label is a whole number, or a list of them with one for each row")]
enum Label {
    One(i64),
    EachRow(Vec<i64>),
}

impl Requests {
    /// Reads a file of one JSON document a line.
    pub fn load(file: &Path) -> Result<Requests, String> {
        let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let read = |(number, line)| request(line).map_err(|error| format!("{}, line {number}: {error}", file.display()));
        let requests = lines.map(read).collect::<Result<Vec<_>, _>>()?;
        if requests.is_empty() {
            return Err(format!("{} has no request in it; write one JSON document a line", file.display()));
        }
        Ok(Requests(requests))
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The request of this turn; after the last one comes the first.
    pub fn turn(&self, turn: u64) -> &Request {
        #[expect(clippy::indexing_slicing, reason = "the remainder is below the length, which is not 0")]
        &self.0[(turn % self.0.len() as u64) as usize]
    }
}

/// `{"label": …, "request": …}`, or any other JSON document, which is sent as it is.
fn request(line: &str) -> Result<Request, String> {
    let said = |error: serde_json::Error| error.to_string();
    if line.trim_start().starts_with('{') {
        let Line { label, request } = serde_json::from_str(line).map_err(said)?;
        if let Some(request) = request {
            let labels = match label {
                None => Vec::new(),
                Some(Label::One(label)) => vec![label],
                Some(Label::EachRow(labels)) => labels,
            };
            return Ok(Request { labels, body: Bytes::copy_from_slice(request.get().as_bytes()) });
        }
    }
    serde_json::from_str::<IgnoredAny>(line).map_err(said)?;
    Ok(Request { labels: Vec::new(), body: Bytes::copy_from_slice(line.as_bytes()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Requests, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Requests::load(file.path())
    }

    #[test]
    fn a_line_is_a_labelled_request_or_the_request_itself() {
        let requests = read("{\"label\": 7, \"request\": {\"a\":  1}}\n\n{\"label\": [1, 2], \"request\": 5}\n{\"b\": 2}\n[3]\n").unwrap();
        let shown: Vec<_> = requests.0.iter().map(|r| (r.labels.as_slice(), r.body.as_ref())).collect();
        let expected: [(&[i64], &[u8]); 4] = [(&[7], b"{\"a\":  1}"), (&[1, 2], b"5"), (&[], b"{\"b\": 2}"), (&[], b"[3]")];
        assert_eq!(shown, expected);
        assert_eq!(requests.turn(5), &requests.0[1]);
    }

    #[test]
    fn a_bad_line_is_named_by_its_number() {
        for (text, said) in [
            ("{}\nnot json\n", "line 2"),
            ("{\"label\": \"seven\", \"request\": {}}", "a label is a whole number"),
            ("{\"request\": {}", "line 1"),
            ("\n\n", "has no request"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(said), "{error}");
        }
        assert!(Requests::load(Path::new("/nowhere/at/all")).unwrap_err().contains("/nowhere/at/all"));
    }
}
