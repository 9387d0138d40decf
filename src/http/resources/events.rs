//! `GET /events`: what happens on this node, as it happens, in Server-Sent Events.

use tide::http::headers::CONTENT_TYPE;
use tide::{Body, Request, Response};

use super::query;
use crate::http::app::State;
use crate::http::{EVENT_NAMES_MAX, Refusal};

/// The header in which a caller that comes back names the last event that it has seen.
const LAST_EVENT_ID_HEADER: &str = "last-event-id";

/// Every event from now on, or behind one that the caller names.
pub(crate) async fn stream(request: Request<State>) -> tide::Result {
    let pairs = query(&request, &["last_event_id", "event"])?;
    let of = |name: &'static str| pairs.iter().filter(move |(other, _)| other == name).map(|(_, value)| value.as_str());
    // A browser that comes back asks for the address it was given, and says in the header where it is by now.
    let in_header = request.header(LAST_EVENT_ID_HEADER).map(|values| values.last().as_str());
    let last = in_header.or_else(|| of("last_event_id").next_back()).filter(|id| !id.is_empty());
    let names: Vec<_> = of("event").flat_map(|names| names.split(',')).filter(|name| !name.is_empty()).map(str::to_owned).collect();
    if names.len() > EVENT_NAMES_MAX {
        let sentence = format!("event= names {} events, and {EVENT_NAMES_MAX} are the most; leave it out to get all", names.len());
        return Err(Refusal::new(400, "bad_query", sentence).into());
    }
    let stream = request.state().control.events().open(last, names)?;
    let answer = Response::builder(200).body(Body::from_reader(stream, None)).header(CONTENT_TYPE, "text/event-stream");
    // nginx gathers answers unless it is told not to, and then an event would wait for those behind it.
    Ok(answer.header("x-accel-buffering", "no").build())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tide::http::{Method, Request, Url};

    use crate::http::fakes::{Fake, get};
    use crate::http::{EVENT_NAMES_MAX, EVENT_STREAMS_MAX, LiveEvents, app};
    use futures::executor::block_on;

    const START: &str = "0000000000000007";

    /// Three events, and whoever asks now gets the rest before the streams end.
    fn fake() -> Fake {
        let fake = Fake::default();
        for name in ["voted", "decided", "link_up"] {
            fake.events.push(name, "{}");
        }
        fake
    }

    /// The names of what a caller is sent who asks this, and whom it takes for the one that was seen last.
    fn events(path: &str, header: Option<&str>) -> Vec<String> {
        let fake = fake();
        let live = fake.events.clone();
        let mut request = Request::new(Method::Get, Url::parse(&format!("http://node{path}")).unwrap());
        if let Some(id) = header {
            request.append_header("Last-Event-ID", id);
        }
        let text = block_on(async {
            let mut answer: tide::http::Response = app(Arc::new(fake), Arc::default()).respond(request).await.unwrap();
            live.end();
            answer.take_body().into_string().await.unwrap()
        });
        assert!(text.contains(": ping\n"), "{text}");
        text.lines().filter_map(|line| line.strip_prefix("event: ")).map(str::to_owned).collect()
    }

    #[test]
    fn the_last_event_is_named_by_the_header_or_by_the_query_and_the_header_wins() {
        let (first, second) = (format!("{START}-1"), format!("{START}-2"));
        assert_eq!(events("/events", None), [""; 0]);
        assert_eq!(events("/events", Some(&first)), ["decided", "link_up"]);
        assert_eq!(events(&format!("/events?last_event_id={first}"), None), ["decided", "link_up"]);
        assert_eq!(events(&format!("/events?last_event_id={first}"), Some(&second)), ["link_up"]);
        assert_eq!(events("/events", Some("")), [""; 0], "an empty id names none");
        assert_eq!(events("/events", Some("node-a-1-1")), ["missed", "voted", "decided", "link_up"]);
    }

    #[test]
    fn a_caller_can_ask_for_some_events_only() {
        let all = format!("last_event_id={START}-0");
        assert_eq!(events(&format!("/events?{all}&event=link_up,voted"), None), ["voted", "link_up"]);
        assert_eq!(events(&format!("/events?{all}&event=decided&event=voted,"), None), ["voted", "decided"]);
        let many = vec!["x"; EVENT_NAMES_MAX + 1].join(",");
        let refused = get(fake(), &format!("/events?event={many}"));
        assert_eq!(refused.error(), (400, "bad_query".into()));
        assert_eq!(get(fake(), "/events?events=decided").error(), (400, "bad_query".into()));
    }

    #[test]
    fn a_stream_over_the_limit_is_503_in_a_sentence() {
        let events = LiveEvents::new(7);
        let _open: Vec<_> = (0..EVENT_STREAMS_MAX).map(|_| events.open(None, Vec::new()).unwrap()).collect();
        let refused = get(Fake { events, ..Fake::default() }, "/events");
        assert_eq!(refused.error(), (503, "too_many_streams".into()));
        assert!(refused.json()["message"].as_str().unwrap().contains("64 event streams"), "{}", refused.body);
    }
}
