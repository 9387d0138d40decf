//! `GET /history`: the decisions, oldest first.

use tide::Request;

use super::{number, query};
use crate::http::Refusal;
use crate::http::app::{State, json};

/// Decisions in one answer, unless the caller says otherwise.
const LIMIT_DEFAULT: u64 = 100;
/// Most decisions in one answer.
const LIMIT_MAX: u64 = 1_000;

/// `limit` decisions beginning at slot `from`; without it, the newest.
pub(crate) async fn list(request: Request<State>) -> tide::Result {
    let pairs = query(&request, &["from", "limit"])?;
    let from = number(&pairs, "from")?;
    let limit = number(&pairs, "limit")?.unwrap_or(LIMIT_DEFAULT);
    let Some(limit) = usize::try_from(limit).ok().filter(|_| (1..=LIMIT_MAX).contains(&limit)) else {
        return Err(Refusal::new(400, "bad_query", format!("limit={limit} is not between 1 and {LIMIT_MAX}")).into());
    };
    json(200, &request.state().control.history(from, limit).await)
}

#[cfg(test)]
mod tests {
    use crate::http::fakes::{Fake, get};

    fn slots(path: &str) -> Vec<u64> {
        let answer = get(Fake::default(), path).json();
        answer["decisions"].as_array().unwrap().iter().map(|d| d["slot"].as_u64().unwrap()).collect()
    }

    #[test]
    fn decisions_come_from_a_slot_on_and_up_to_a_limit() {
        assert_eq!(slots("/history?from=3&limit=2"), [3, 4]);
        assert_eq!(slots("/history").len(), 100);
        assert_eq!(slots("/history?limit=1000").len(), 1_000);
    }

    #[test]
    fn a_bad_number_is_400_and_named() {
        for (query, named) in [
            ("from=x", "from=x"),
            ("from=-1", "from=-1"),
            ("limit=1.5", "limit=1.5"),
            ("limit=0", "limit=0"),
            ("limit=1001", "limit=1001"),
            ("limit=", "limit= "),
            ("form=3", "\"form\""),
        ] {
            let answer = get(Fake::default(), &format!("/history?{query}"));
            assert_eq!(answer.error(), (400, "bad_query".into()), "{query}");
            assert!(answer.json()["message"].as_str().unwrap().contains(named), "{}", answer.body);
        }
    }
}
