//! An ONNX file's frame, checked before rten reads it: every field lies within the message around it, and messages do not nest without end.
//!
//! rten 0.27 trusts lengths. A cut or damaged file can send it round in a circle for ever, make it reserve memory until the process is
//! killed, or overflow its stack; a node that voted must not die of a file. On the way this collects what rten does not
//! tell: the element types that the file declares.

use std::collections::BTreeMap;

/// Messages within messages at most. Real models have about six, and four more for each If or Loop within another.
const DEPTH_MAX: usize = 64;

/// The file is cut off or damaged here.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("it is cut off, damaged, or no ONNX file (seen at byte {at}: {what})")]
pub(crate) struct Damaged {
    at: usize,
    what: &'static str,
}

/// The messages of onnx.proto that hold others, as far as rten reads them.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    Value,
    Type,
    TensorType,
    SequenceType,
    Shape,
    /// Holds none.
    Leaf,
}

impl Message {
    /// What a field of this message holds, if it is a message.
    const fn field(self, number: u64) -> Option<Message> {
        Some(match (self, number) {
            (Message::Model, 7) | (Message::Attribute, 6 | 11) => Message::Graph,
            (Message::Model, 8 | 14) | (Message::Tensor, 3 | 13) | (Message::Shape, 1) => Message::Leaf,
            (Message::Graph, 1) => Message::Node,
            (Message::Graph, 5) | (Message::Attribute, 5 | 10) => Message::Tensor,
            (Message::Graph, 11..=13) => Message::Value,
            (Message::Node, 5) => Message::Attribute,
            (Message::Value, 2) | (Message::SequenceType, 1) => Message::Type,
            (Message::Type, 1) => Message::TensorType,
            (Message::Type, 4) => Message::SequenceType,
            (Message::TensorType, 2) => Message::Shape,
            _ => return None,
        })
    }
}

/// Checks a file, and gives the ONNX numbers of the element types that its graph declares for tensors, by their names.
pub(crate) fn check(file: &[u8]) -> Result<BTreeMap<String, u64>, Damaged> {
    let mut declared = BTreeMap::new();
    let model = Part { bytes: file, at: 0 };
    check_message(model, Message::Model, 0)?;
    for graph in model.parts(7) {
        for value in graph.parts(11).chain(graph.parts(12)) {
            let name = value.parts(1).last().and_then(|name| std::str::from_utf8(name.bytes).ok());
            let datatype = value.parts(2).flat_map(|kind| kind.parts(1)).filter_map(|tensor| tensor.number(1)).last();
            if let (Some(name), Some(datatype)) = (name, datatype) {
                declared.insert(name.to_owned(), datatype);
            }
        }
    }
    Ok(declared)
}

fn check_message(part: Part<'_>, message: Message, depth: usize) -> Result<(), Damaged> {
    if depth > DEPTH_MAX {
        return Err(Damaged { at: part.at, what: "messages nested too deep" });
    }
    for field in part.fields() {
        let (number, content) = field?;
        match (message.field(number), content) {
            (Some(inner), Content::Bytes(part)) => check_message(part, inner, depth + 1)?,
            (Some(_), _) => return Err(Damaged { at: part.at, what: "a number where a message belongs" }),
            (None, _) => {}
        }
    }
    Ok(())
}

/// A piece of the file, and where it begins.
#[derive(Clone, Copy)]
struct Part<'a> {
    bytes: &'a [u8],
    at: usize,
}

enum Content<'a> {
    Number(u64),
    Bytes(Part<'a>),
    /// A number of fixed width, which nothing here asks for.
    Fixed,
}

impl<'a> Part<'a> {
    fn fields(self) -> impl Iterator<Item = Result<(u64, Content<'a>), Damaged>> {
        let mut rest = self;
        std::iter::from_fn(move || {
            if rest.bytes.is_empty() {
                return None;
            }
            let field = rest.field();
            if field.is_err() {
                rest.bytes = &[];
            }
            Some(field)
        })
    }

    /// The sub-messages or texts of this field.
    fn parts(self, wanted: u64) -> impl Iterator<Item = Part<'a>> {
        self.fields().filter_map(move |field| match field {
            Ok((number, Content::Bytes(part))) if number == wanted => Some(part),
            _ => None,
        })
    }

    /// The number in this field; the last one counts.
    fn number(self, wanted: u64) -> Option<u64> {
        let numbers = self.fields().filter_map(|field| match field {
            Ok((number, Content::Number(value))) if number == wanted => Some(value),
            _ => None,
        });
        numbers.last()
    }

    fn field(&mut self) -> Result<(u64, Content<'a>), Damaged> {
        let tag = self.varint()?;
        let content = match tag & 7 {
            0 => Content::Number(self.varint()?),
            1 => self.take(8).map(|_| Content::Fixed)?,
            2 => {
                let length = self.varint()?;
                Content::Bytes(self.take(length)?)
            }
            5 => self.take(4).map(|_| Content::Fixed)?,
            _ => return Err(self.damaged("an unknown kind of field")),
        };
        Ok((tag >> 3, content))
    }

    fn varint(&mut self) -> Result<u64, Damaged> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let part = self.take(1)?;
            let byte = part.bytes.first().copied().unwrap_or_default();
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.damaged("a number without end"))
    }

    fn take(&mut self, length: u64) -> Result<Part<'a>, Damaged> {
        let split = usize::try_from(length).ok().and_then(|length| self.bytes.split_at_checked(length));
        let (bytes, rest) = split.ok_or_else(|| self.damaged("a field longer than what holds it"))?;
        let taken = Part { bytes, at: self.at };
        *self = Part { bytes: rest, at: self.at + bytes.len() };
        Ok(taken)
    }

    fn damaged(&self, what: &'static str) -> Damaged {
        Damaged { at: self.at, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Vec<u8> {
        std::fs::read("models/digits-v1.onnx").unwrap()
    }

    #[test]
    fn declared_types_are_found_by_name() {
        let declared = check(&model()).unwrap();
        assert_eq!(declared, [("pixels".to_owned(), 1), ("probabilities".to_owned(), 1)].into());
    }

    #[test]
    fn a_file_cut_anywhere_inside_its_graph_is_refused() {
        let model = model();
        let graph = model.iter().position(|byte| *byte == 7 << 3 | 2).unwrap();
        let end = {
            let mut part = Part { bytes: &model[graph..], at: 0 };
            part.field().unwrap();
            graph + part.at
        };
        for cut in graph + 1..end {
            assert!(check(&model[..cut]).is_err(), "cut at {cut}");
        }
    }

    #[test]
    fn lengths_that_wrap_around_are_refused() {
        // Field 1, a text of 2^64 − 12 bytes: rten would go twelve bytes back and read it again, for ever.
        let negative = [10, 0xf4, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        assert_eq!(check(&negative), Err(Damaged { at: 11, what: "a field longer than what holds it" }));
        assert_eq!(check(&[0xff; 99]), Err(Damaged { at: 10, what: "a number without end" }));
        assert_eq!(check(&[10, 5, 1]), Err(Damaged { at: 2, what: "a field longer than what holds it" }));
    }

    #[test]
    fn graphs_within_graphs_without_end_are_refused() {
        let wrap = |tag: u8, inner: &[u8]| {
            let mut length = inner.len();
            let mut bytes = vec![tag << 3 | 2];
            while length >= 0x80 {
                bytes.push(length as u8 | 0x80);
                length >>= 7;
            }
            bytes.push(length as u8);
            bytes.extend_from_slice(inner);
            bytes
        };
        let nested = |times: usize| {
            let graph = (0..times).fold(Vec::new(), |graph, _| wrap(1, &wrap(5, &wrap(6, &graph))));
            wrap(7, &graph)
        };
        assert!(check(&nested(10)).is_ok());
        assert_eq!(check(&nested(1_000)).unwrap_err().what, "messages nested too deep");
    }
}
