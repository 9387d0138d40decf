//! The Prometheus text exposition format 0.0.4: <https://prometheus.io/docs/instrumenting/exposition_formats/>.

use std::fmt::{self, Write};

/// The content type of what [`encode`] writes.
pub const METRICS_CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// One family: everything of one name.
#[derive(Clone, Debug, PartialEq)]
pub struct Metric {
    /// Letters, digits and `_`, with the unit last; a counter's ends in `_total`.
    pub name: &'static str,
    /// One sentence.
    pub help: &'static str,
    /// What was measured.
    pub series: Series,
}

/// What was measured, by kind.
#[derive(Clone, Debug, PartialEq)]
pub enum Series {
    /// Only ever goes up.
    Counter(Vec<Sample<f64>>),
    /// Goes up and down.
    Gauge(Vec<Sample<f64>>),
    /// A distribution.
    Histogram(Vec<Sample<Histogram>>),
}

/// One value with its labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample<V> {
    /// Name (letters, digits and `_`; not `le`) to value (any text).
    pub labels: Vec<(&'static str, String)>,
    /// The value.
    pub value: V,
}

/// A distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    /// Upper bound, ascending and finite, and how many values were at or below it.
    pub buckets: Vec<(f64, u64)>,
    /// The sum of all values.
    pub sum: f64,
    /// How many values there were.
    pub count: u64,
}

impl Metric {
    /// A counter without labels.
    pub fn counter(name: &'static str, help: &'static str, value: f64) -> Metric {
        Metric { name, help, series: Series::Counter(vec![Sample::new([], value)]) }
    }

    /// A gauge without labels.
    pub fn gauge(name: &'static str, help: &'static str, value: f64) -> Metric {
        Metric { name, help, series: Series::Gauge(vec![Sample::new([], value)]) }
    }
}

impl<V> Sample<V> {
    /// A value with these labels.
    pub fn new(labels: impl Into<Vec<(&'static str, String)>>, value: V) -> Sample<V> {
        Sample { labels: labels.into(), value }
    }
}

/// Writes the families, each once.
pub fn encode(metrics: &[Metric]) -> String {
    let mut text = String::new();
    for metric in metrics {
        // Writing to a String does not fail.
        let _ = metric.write(&mut text);
    }
    text
}

impl Metric {
    fn write(&self, to: &mut String) -> fmt::Result {
        let Metric { name, help, series } = self;
        let kind = match series {
            Series::Counter(_) => "counter",
            Series::Gauge(_) => "gauge",
            Series::Histogram(_) => "histogram",
        };
        writeln!(to, "# HELP {name} {}\n# TYPE {name} {kind}", help.replace('\\', "\\\\").replace('\n', "\\n"))?;
        match series {
            Series::Counter(samples) | Series::Gauge(samples) => {
                samples.iter().try_for_each(|sample| line(to, name, "", &sample.labels, None, sample.value))
            }
            Series::Histogram(samples) => samples.iter().try_for_each(|sample| sample.write(to, name)),
        }
    }
}

impl Sample<Histogram> {
    fn write(&self, to: &mut String, name: &str) -> fmt::Result {
        let Histogram { buckets, sum, count } = &self.value;
        for (bound, below) in buckets.iter().copied().chain([(f64::INFINITY, *count)]) {
            line(to, name, "_bucket", &self.labels, Some(bound), below as f64)?;
        }
        line(to, name, "_sum", &self.labels, None, *sum)?;
        line(to, name, "_count", &self.labels, None, *count as f64)
    }
}

/// One line: name, labels in braces if there are any, value.
fn line(to: &mut String, name: &str, suffix: &str, labels: &[(&str, String)], bound: Option<f64>, value: f64) -> fmt::Result {
    write!(to, "{name}{suffix}")?;
    let bound = bound.map(|bound| ("le", Number(bound).to_string()));
    let mut before = '{';
    for (label, value) in labels.iter().chain(bound.as_ref()) {
        write!(to, "{before}{label}=\"{}\"", value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))?;
        before = ',';
    }
    if before == ',' {
        to.push('}');
    }
    writeln!(to, " {}", Number(value))
}

/// A number as Prometheus reads it.
struct Number(f64);

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            f64::INFINITY => f.write_str("+Inf"),
            f64::NEG_INFINITY => f.write_str("-Inf"),
            number => write!(f, "{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_are_written_line_by_line_as_the_format_has_it() {
        let odd = "a \"quoted\" back\\slash\nand a new line";
        let text = encode(&[
            Metric::gauge("slot", "The head.\nWith a \\ in it.", 17.0),
            Metric {
                name: "requests_total",
                help: "Requests.",
                series: Series::Counter(vec![
                    Sample::new([("route", "default".to_owned()), ("model", odd.to_owned())], 12_345_678_901.0),
                    Sample::new([("route", "b".to_owned())], 0.5),
                ]),
            },
            Metric {
                name: "sync_seconds",
                help: "Syncs.",
                series: Series::Histogram(vec![Sample::new(
                    [("node", "a".to_owned())],
                    Histogram { buckets: vec![(0.001, 3), (0.25, 5)], sum: 0.75, count: 6 },
                )]),
            },
            Metric { name: "none", help: "No samples yet.", series: Series::Gauge(Vec::new()) },
            Metric { name: "odd", help: "Odd.", series: Series::Gauge([f64::NAN, f64::NEG_INFINITY].map(|v| Sample::new([], v)).into()) },
        ]);
        let expected = [
            r"# HELP slot The head.\nWith a \\ in it.",
            "# TYPE slot gauge",
            "slot 17",
            "# HELP requests_total Requests.",
            "# TYPE requests_total counter",
            r#"requests_total{route="default",model="a \"quoted\" back\\slash\nand a new line"} 12345678901"#,
            r#"requests_total{route="b"} 0.5"#,
            "# HELP sync_seconds Syncs.",
            "# TYPE sync_seconds histogram",
            r#"sync_seconds_bucket{node="a",le="0.001"} 3"#,
            r#"sync_seconds_bucket{node="a",le="0.25"} 5"#,
            r#"sync_seconds_bucket{node="a",le="+Inf"} 6"#,
            r#"sync_seconds_sum{node="a"} 0.75"#,
            r#"sync_seconds_count{node="a"} 6"#,
            "# HELP none No samples yet.",
            "# TYPE none gauge",
            "# HELP odd Odd.",
            "# TYPE odd gauge",
            "odd NaN",
            "odd -Inf",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
        assert!(text.ends_with('\n'));
    }
}
