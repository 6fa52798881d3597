"""From judged tables to what people look at: tables of text and figures."""
