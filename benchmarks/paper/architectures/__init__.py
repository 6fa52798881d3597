"""Networks in neither of the paper's settings: recurrent ones, attention that shares nothing, a hybrid."""
