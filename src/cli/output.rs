//! What is printed: tables for people, JSON for programs, colours for terminals only.

use std::io::{self, Write};

use comfy_table::{Attribute, Cell, CellAlignment, Color, Table, presets};
use serde::Serialize;

use crate::api::LeaseView;
use crate::cli::Exit;
use crate::cli::args::Format;

/// What a text says, as a colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tone {
    /// As it should be.
    Good,
    /// Worth a look.
    Doubt,
    /// Wrong.
    Bad,
}

impl Tone {
    fn escape(self) -> &'static str {
        match self {
            Tone::Good => "\x1b[32m",
            Tone::Doubt => "\x1b[33m",
            Tone::Bad => "\x1b[31m",
        }
    }

    fn color(self) -> Color {
        match self {
            Tone::Good => Color::DarkGreen,
            Tone::Doubt => Color::DarkYellow,
            Tone::Bad => Color::DarkRed,
        }
    }
}

/// One field of a table.
#[derive(Clone, Debug, Default)]
pub struct Field {
    text: String,
    tone: Option<Tone>,
    number: bool,
}

impl Field {
    /// A text.
    pub fn text(text: impl ToString) -> Field {
        Field { text: text.to_string(), ..Field::default() }
    }

    /// A number, to the right.
    pub fn number(number: impl ToString) -> Field {
        Field { number: true, ..Field::text(number) }
    }

    /// What may be missing, with "-" for that.
    pub fn maybe(text: Option<impl ToString>) -> Field {
        text.map_or_else(|| Field::text("-"), Field::text)
    }

    /// For how long a lease runs yet.
    pub fn lease(lease: LeaseView) -> Field {
        match lease.held {
            true => Field::number(format!("{:.1} s", lease.remaining_ms as f64 / 1e3)),
            false => Field::text("none").toned(Tone::Doubt),
        }
    }

    /// In this tone.
    pub fn toned(self, tone: Tone) -> Field {
        Field { tone: Some(tone), ..self }
    }
}

/// Standard output and standard error, and how to write on them.
///
/// Nothing here fails: the first write that does ends all further ones, and [`Console::finish`] says so unless it was the reader who left.
pub struct Console<'a> {
    out: &'a mut dyn Write,
    err: &'a mut dyn Write,
    format: Format,
    terminal: bool,
    colour: bool,
    broken: Option<io::Error>,
    /// What is written while a picture is made.
    held: Option<Vec<u8>>,
    /// There was a picture before.
    pictured: bool,
}

impl<'a> Console<'a> {
    /// `terminal`: standard output is one. `colour`: it may be coloured then.
    pub fn new(out: &'a mut dyn Write, err: &'a mut dyn Write, format: Format, terminal: bool, colour: bool) -> Console<'a> {
        Console { out, err, format, terminal, colour: colour && terminal, broken: None, held: None, pictured: false }
    }

    /// Pictures take each other's place.
    pub fn is_live(&self) -> bool {
        self.terminal && !self.is_json()
    }

    /// Data is wanted as JSON.
    pub fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    /// Nobody reads standard output any more, or it cannot be written.
    pub fn is_closed(&self) -> bool {
        self.broken.is_some()
    }

    /// A line of data.
    pub fn line(&mut self, text: &str) {
        self.write(|out| writeln!(out, "{}", text.trim_end()));
    }

    /// Data by whatever writes it.
    pub fn write(&mut self, write: impl FnOnce(&mut dyn Write) -> io::Result<()>) {
        if self.broken.is_none() {
            let written = match &mut self.held {
                Some(held) => write(held),
                None => write(self.out),
            };
            self.broken = written.err();
        }
    }

    /// Data: as JSON, or for people as `show` prints it.
    pub fn data(&mut self, data: &impl Serialize, show: impl FnOnce(&mut Self)) {
        if !self.is_json() {
            return show(self);
        }
        match serde_json::to_string_pretty(data) {
            Ok(text) => self.line(&text),
            Err(error) => self.error(&format!("this cannot be written as JSON: {error}")),
        }
    }

    /// A text in a tone, where there are colours.
    pub fn toned(&self, tone: Tone, text: impl ToString) -> String {
        if self.colour { format!("{}{}\x1b[0m", tone.escape(), text.to_string()) } else { text.to_string() }
    }

    /// Columns under their names.
    pub fn table(&mut self, header: &[&str], rows: impl IntoIterator<Item = Vec<Field>>) {
        let mut table = Table::new();
        // Nothing is wrapped to the terminal's width: a row is a line, there and in a pipe.
        table.load_style(presets::NOTHING).force_no_tty();
        let colour = self.colour;
        if colour {
            table.enforce_styling();
        }
        let bold = |name: &&str| if colour { Cell::new(name).add_attribute(Attribute::Bold) } else { Cell::new(name) };
        table.set_header(header.iter().map(bold));
        let cell = |field: Field| {
            let cell = Cell::new_owned(field.text);
            let cell = if field.number { cell.set_alignment(CellAlignment::Right) } else { cell };
            match field.tone {
                Some(tone) if colour => cell.fg(tone.color()),
                _ => cell,
            }
        };
        table.add_rows(rows.into_iter().map(|row| row.into_iter().map(cell).collect::<Vec<_>>()));
        for column in table.column_iter_mut() {
            column.set_padding((0, 2));
        }
        self.line(&table.trim_fmt());
    }

    /// Data that takes the place of what was last shown so, where there is a terminal for it; elsewhere it comes behind that.
    ///
    /// It is written at one go, and nothing is wiped before there is something to put there: the eye sees no gap.
    pub fn picture(&mut self, show: impl FnOnce(&mut Self)) {
        if !self.is_live() {
            return show(self);
        }
        self.held = Some(Vec::new());
        show(self);
        let held = self.held.take().unwrap_or_default();
        let held = String::from_utf8_lossy(&held).replace('\n', "\x1b[K\n");
        // Home; the first time the screen is wiped, afterwards only what is left below.
        let (before, after) = if self.pictured { ("\x1b[H", "\x1b[J") } else { ("\x1b[H\x1b[2J", "") };
        self.pictured = true;
        self.write(|out| write!(out, "{before}{held}{after}"));
        self.flush();
    }

    /// Makes what was written appear.
    pub fn flush(&mut self) {
        self.write(|out| out.flush());
    }

    /// Talk. If standard error is gone there is nobody to tell.
    pub fn say(&mut self, text: &str) {
        let _ = writeln!(self.err, "{}", text.trim_end());
    }

    /// An error.
    pub fn error(&mut self, text: &str) {
        self.say(&format!("error: {text}"));
    }

    /// Writes out what is left, and says so if data was lost. A reader who has left (`| head`) has lost nothing.
    pub fn finish(mut self, exit: Exit) -> Exit {
        self.flush();
        match self.broken.take() {
            Some(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                self.error(&format!("standard output cannot be written: {error}"));
                if exit == Exit::Ok { Exit::Refused } else { exit }
            }
            _ => exit,
        }
    }
}

/// `1 vote`, `2 votes`.
pub fn counted(count: u64, thing: &str) -> String {
    format!("{count} {thing}{}", if count == 1 { "" } else { "s" })
}

/// Names in a row.
pub fn listed(names: impl IntoIterator<Item = impl ToString>) -> String {
    names.into_iter().map(|name| name.to_string()).collect::<Vec<_>>().join(", ")
}

/// Milliseconds, with as many decimals as are worth reading.
pub fn milliseconds(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.2}") } else { format!("{ms:.1}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(format: Format, terminal: bool, colour: bool) -> String {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console::new(&mut out, &mut err, format, terminal, colour);
        console.data(&[1], |console| {
            let rows = [vec![Field::text("a").toned(Tone::Bad), Field::number(7)], vec![Field::maybe(None::<&str>), Field::number(10)]];
            console.table(&["name", "count"], rows);
            console.line(&console.toned(Tone::Good, "well"));
        });
        assert_eq!(console.finish(Exit::Ok), Exit::Ok);
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn a_table_is_plain_columns_without_a_terminal() {
        assert_eq!(printed(Format::Table, false, true), "name  count\na         7\n-        10\nwell\n");
    }

    #[test]
    fn a_terminal_has_colours_unless_told_not_to() {
        assert!(printed(Format::Table, true, true).contains("\x1b[32mwell"));
        assert!(!printed(Format::Table, true, false).contains('\x1b'));
    }

    #[test]
    fn json_is_for_programs_and_has_no_colours() {
        assert_eq!(printed(Format::Json, true, true), "[\n  1\n]\n");
    }

    struct Fails(io::ErrorKind);

    impl Write for Fails {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_who_leaves_is_no_error_and_a_full_disk_is_one() {
        for (kind, exit, said) in [(io::ErrorKind::BrokenPipe, Exit::Ok, false), (io::ErrorKind::StorageFull, Exit::Refused, true)] {
            let (mut out, mut err) = (Fails(kind), Vec::new());
            let mut console = Console::new(&mut out, &mut err, Format::Table, false, false);
            console.line("data");
            assert!(console.is_closed());
            console.line("more data");
            assert_eq!(console.finish(exit), exit);
            assert_eq!(!err.is_empty(), said);
        }
    }
}
